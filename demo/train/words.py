"""Words from which prompts are made: everyday English words, names, and words that do not exist."""

COMMON = """
able acid acre actor adult after again agent air album alert alive alone amber anchor angel angle animal answer apple april apron arch arena
arm arrow art ash aunt autumn axe baby back badge bag baker ball band bank bar barn base basket bat bath beach beam bean bear beard bed bee
beef bell belt bench berry bike bird black blade blank blue boat body bolt bone book boot border bottle bowl box boy brain branch brave bread
breeze brick bridge bright broad broom brown brush bucket build bulb bus bush butter button cabin cable cake calm camel camera camp canal
candle canoe canvas cap captain car card care cargo carpet carrot cart case castle cat cave ceiling cello center chain chair chalk chance
charm cheek cheese cherry chest chief child choice circle city clay clean clear clever cliff climb clock cloth cloud clover clown club coach
coal coast coat coffee coin cold color comet cook copper coral corn corner cotton couch cover cow crab cradle craft crane cream creek crew
crop crow crowd crown crystal cup curtain curve cycle daily dance danger dark dawn day deep deer desert desk diamond dinner dish doctor dog
doll donkey door dove dragon drain draw dream dress drift drink drum dry duck dusk dust eagle early earth east easy echo edge egg eight elbow
empty engine evening event exit fabric face factory fair fall family famous fan farm fast father feather fence fern ferry field fig film final
finger fire fish flag flame flat flavor flight flock floor flour flower flute fog folk food foot forest fork fort fox frame free fresh frog
frost fruit full garden garlic gate gentle ghost giant gift ginger girl glad glass globe glove goat gold good grain grand grape grass gray
great green grid ground group guard guest guide guitar habit half hall hammer hand happy harbor hard harp hat hawk hay heart heavy hedge
helmet help herb hero hill hint hive home honest honey hood hook horn horse hotel house human humble hunter ice idea igloo inch index ink
iron island ivory jacket jar jazz jelly jewel job join joke journal journey judge juice jump jungle junior kettle key kind king kitchen kite
kitten knee knight knot label ladder lady lake lamp land lantern large laser last laugh lava lawn layer leaf learn leather lemon letter level
light lily lime line lion lip list little lizard local log long loud lucky lunch machine magic magnet mail main major maple marble march
market mask master match meadow meal medal melon melody member metal middle midnight mild milk mill mind mine mint minute mirror mist mixed
model modern moment money monkey month moon moral moss mother motor mountain mouse mouth mud museum music nail name narrow nature navy near
neck needle nest net never new nice night nine noble noise north nose note novel number nurse nut oak oasis ocean office olive onion open
orange orbit orchid order other otter oven owl own oxygen oyster paddle page paint pair palace palm panda paper parade parent park parrot
part party path peace peach peanut pear pearl pen pencil people pepper person phone photo piano picnic picture pie pigeon pillow pilot pine
pink pipe place plain planet plant plate player plaza plum pocket poem point polar pond pony pool poor port post potato powder power prince
print prize proud pump puppy purple purse puzzle quail queen quick quiet quilt quiz rabbit race radio rail rain ranch rapid raven ready real
red reef rent rhyme rice rich ride ring ripe river road robin robot rock rocket roof room root rope rose rough round royal ruby rug ruler
run rural saddle safe sail salad salt same sand satin sauce scale scarf scene school science score scout sea season seat second secret seed
seven shade shadow shark sharp sheep shelf shell shine ship shirt shoe shop shore short shoulder shrimp sign silent silk silver simple
singer sister six skate skill sky sled sleep slow small smart smile smoke smooth snail snake snow soap sock soft soil solid song sound soup
south space spark speed spice spider spirit spoon sport spring square stable stage stair star state station steam steel stem step stone
storm story stove straw stream street string strong studio sugar suit summer sun sunny supper surf swan sweet swift swim sword table tail
tale tall tank target tea team temple ten tent thick thin thread throne thumb thunder tiger timber time tiny title toast today token tomato
tool tooth top torch total tower town toy track trade train travel tree triangle trip truck true trumpet trunk truth tulip tunnel turkey
turn turtle twelve twin uncle under union unit upper urban useful valley value van velvet venus village vine violet violin visit vivid voice
volcano wagon walk wall walnut warm watch water wave wax weather west whale wheat wheel whisper white wide wild willow wind window wing
winter wise wolf wonder wood wool word world worm yard yellow young zebra zero zone
""".split()

FIRST_NAMES = """
ada alan alice amos anna ben bella boris clara carl dana david edith emil ella felix flora george grace hanna hugo ida ivan jack jane karl
kate leo lena lucy marc maria max mia nina noah nora oscar olga otto paul petra quinn rosa ruth sam sara simon tara theo tina tom uma vera
victor wanda will yara zoe
""".split()

LAST_NAMES = """
adams baker barnes bell bishop blake brooks burke carter chen clark cole cooper cruz dean diaz doyle ellis evans fisher flynn ford foster
frost garcia gibson grant green hale hall hansen harris hayes hill holt hunt jones keller kent king klein lane larsen lee logan lopez marsh
mason meyer miller moore moss nash novak owens page parker perez price quill ramos reed reyes rossi ryan santos scott shaw silva smith stone
swift tanner torres turner vance wagner walker ward weber wells west wolf young
""".split()

ONSETS = "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr sh sk sl sn sp st str th tr tw".split()
VOWELS = "a e i o u ai ea ee oa oo ou".split()
CODAS = ["", "", "", "b", "d", "g", "k", "l", "m", "n", "p", "r", "s", "t", "x", "ck", "ll", "nd", "ng", "nt", "rk", "rm", "sh", "st"]


def invented(rng, syllables=None):
    """A word that can be spoken and means nothing."""
    n = syllables or rng.choice((1, 1, 2, 2, 2))
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(n))[:11]


def word(rng):
    """One word, of those that exist or not."""
    return rng.choice(COMMON) if rng.random() < 0.6 else invented(rng)


def letters(rng, low=3, high=9):
    """Letters in no order."""
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(low, high)))


def phrase(rng, low=2, high=4):
    """A few words with single spaces between them."""
    return " ".join(word(rng) for _ in range(rng.randint(low, high)))
