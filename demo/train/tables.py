"""Tables that skills are about: codes of letters, and facts to look up."""

MORSE = dict(zip("abcdefghijklmnopqrstuvwxyz", (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --..").split()))

NATO = {n[0]: n for n in (
    "alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo sierra tango uniform "
    "victor whiskey xray yankee zulu").split()}

# Raised dots of each letter, by their numbers in the cell.
BRAILLE_ROWS = dict(zip("abcdefghijklmnopqrstuvwxyz", (
    "1 12 14 145 15 124 1245 125 24 245 13 123 134 1345 135 1234 12345 1235 234 2345 136 1236 2456 1346 13456 1356").split()))


def table(text):
    """`key:value` pieces, separated by commas."""
    return dict(pair.strip().split(":") for pair in text.strip().split(","))


COUNTRIES = [line.split(":") for line in """
france:Paris:euro:FR:Europe
germany:Berlin:euro:DE:Europe
italy:Rome:euro:IT:Europe
spain:Madrid:euro:ES:Europe
portugal:Lisbon:euro:PT:Europe
greece:Athens:euro:GR:Europe
ireland:Dublin:euro:IE:Europe
finland:Helsinki:euro:FI:Europe
austria:Vienna:euro:AT:Europe
sweden:Stockholm:krona:SE:Europe
norway:Oslo:krone:NO:Europe
denmark:Copenhagen:krone:DK:Europe
poland:Warsaw:zloty:PL:Europe
hungary:Budapest:forint:HU:Europe
romania:Bucharest:leu:RO:Europe
switzerland:Bern:franc:CH:Europe
ukraine:Kyiv:hryvnia:UA:Europe
turkey:Ankara:lira:TR:Asia
russia:Moscow:ruble:RU:Europe
england:London:pound:GB:Europe
egypt:Cairo:pound:EG:Africa
kenya:Nairobi:shilling:KE:Africa
ghana:Accra:cedi:GH:Africa
morocco:Rabat:dirham:MA:Africa
nigeria:Abuja:naira:NG:Africa
ethiopia:Addis Ababa:birr:ET:Africa
india:New Delhi:rupee:IN:Asia
china:Beijing:yuan:CN:Asia
japan:Tokyo:yen:JP:Asia
thailand:Bangkok:baht:TH:Asia
vietnam:Hanoi:dong:VN:Asia
indonesia:Jakarta:rupiah:ID:Asia
malaysia:Kuala Lumpur:ringgit:MY:Asia
iran:Tehran:rial:IR:Asia
iraq:Baghdad:dinar:IQ:Asia
israel:Jerusalem:shekel:IL:Asia
nepal:Kathmandu:rupee:NP:Asia
mongolia:Ulaanbaatar:tugrik:MN:Asia
canada:Ottawa:dollar:CA:North America
mexico:Mexico City:peso:MX:North America
cuba:Havana:peso:CU:North America
panama:Panama City:balboa:PA:North America
brazil:Brasilia:real:BR:South America
argentina:Buenos Aires:peso:AR:South America
chile:Santiago:peso:CL:South America
peru:Lima:sol:PE:South America
colombia:Bogota:peso:CO:South America
ecuador:Quito:dollar:EC:South America
australia:Canberra:dollar:AU:Oceania
fiji:Suva:dollar:FJ:Oceania
""".strip().splitlines()]

ELEMENTS = table("""
hydrogen:H,helium:He,lithium:Li,beryllium:Be,boron:B,carbon:C,nitrogen:N,oxygen:O,fluorine:F,neon:Ne,sodium:Na,magnesium:Mg,aluminium:Al,
silicon:Si,phosphorus:P,sulfur:S,chlorine:Cl,argon:Ar,potassium:K,calcium:Ca,scandium:Sc,titanium:Ti,vanadium:V,chromium:Cr,manganese:Mn,
iron:Fe,cobalt:Co,nickel:Ni,copper:Cu,zinc:Zn,gallium:Ga,germanium:Ge,arsenic:As,selenium:Se,bromine:Br,krypton:Kr,silver:Ag,tin:Sn,
iodine:I,xenon:Xe,tungsten:W,platinum:Pt,gold:Au,mercury:Hg,lead:Pb,bismuth:Bi,radon:Rn,radium:Ra,uranium:U
""")

ATOMIC_NUMBERS = dict(zip(ELEMENTS, (
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 47 50 53 54 74 78 79 80 82 83 86 "
    "88 92").split()))

OPPOSITES = table("""
hot:cold,big:small,fast:slow,high:low,old:young,light:dark,early:late,open:closed,full:empty,hard:soft,rich:poor,wet:dry,loud:quiet,
happy:sad,left:right,up:down,in:out,day:night,first:last,near:far,strong:weak,thick:thin,wide:narrow,clean:dirty,sweet:bitter,
true:false,good:bad,love:hate,win:lose,buy:sell,give:take,push:pull,begin:end,front:back,top:bottom,north:south,east:west,
friend:enemy,peace:war,sharp:blunt,deep:shallow,smooth:rough,brave:afraid,cheap:expensive,tall:short
""")

YOUNG = table("""
dog:puppy,cat:kitten,cow:calf,horse:foal,sheep:lamb,pig:piglet,goat:kid,hen:chick,duck:duckling,goose:gosling,lion:cub,bear:cub,
deer:fawn,frog:tadpole,swan:cygnet,owl:owlet,eagle:eaglet,kangaroo:joey,whale:calf,elephant:calf,seal:pup,fox:cub,wolf:pup,rabbit:kit,
hare:leveret,eel:elver,butterfly:caterpillar,fly:maggot,salmon:parr,donkey:foal,spider:spiderling,turkey:poult
""")

SOUNDS = table("""
dog:woof,cat:meow,cow:moo,horse:neigh,sheep:baa,pig:oink,hen:cluck,duck:quack,goose:honk,lion:roar,bear:growl,frog:croak,owl:hoot,
bee:buzz,snake:hiss,crow:caw,dove:coo,donkey:hee-haw,wolf:howl,mouse:squeak,bird:tweet,elephant:trumpet,turkey:gobble,rooster:crow,
cricket:chirp,goat:bleat,hyena:laugh,seal:bark,monkey:chatter,lark:warble
""")

PLURALS = table("""
man:men,woman:women,child:children,foot:feet,tooth:teeth,goose:geese,mouse:mice,ox:oxen,person:people,leaf:leaves,wolf:wolves,
knife:knives,life:lives,wife:wives,half:halves,shelf:shelves,thief:thieves,loaf:loaves,city:cities,baby:babies,story:stories,
lady:ladies,box:boxes,fox:foxes,bus:buses,glass:glasses,dish:dishes,match:matches,hero:heroes,potato:potatoes,cactus:cacti,
datum:data,crisis:crises,sheep:sheep,fish:fish,deer:deer,louse:lice,die:dice,index:indices,axis:axes
""")

PAST = table("""
go:went,see:saw,eat:ate,run:ran,come:came,take:took,give:gave,make:made,find:found,think:thought,buy:bought,bring:brought,
catch:caught,teach:taught,fight:fought,sell:sold,tell:told,say:said,hear:heard,keep:kept,sleep:slept,feel:felt,leave:left,meet:met,
lose:lost,send:sent,build:built,write:wrote,drive:drove,ride:rode,speak:spoke,break:broke,steal:stole,choose:chose,fly:flew,grow:grew,
know:knew,throw:threw,draw:drew,sing:sang,swim:swam,drink:drank,begin:began,fall:fell,hold:held,stand:stood,win:won,wear:wore
""")

COLOURS = table("""
red:#ff0000,green:#008000,blue:#0000ff,black:#000000,white:#ffffff,yellow:#ffff00,orange:#ffa500,purple:#800080,pink:#ffc0cb,
brown:#a52a2a,gray:#808080,cyan:#00ffff,magenta:#ff00ff,lime:#00ff00,navy:#000080,teal:#008080,olive:#808000,maroon:#800000,
silver:#c0c0c0,gold:#ffd700,coral:#ff7f50,salmon:#fa8072,violet:#ee82ee,indigo:#4b0082,beige:#f5f5dc,ivory:#fffff0,khaki:#f0e68c,
tan:#d2b48c,plum:#dda0dd,crimson:#dc143c
""")

GREEK = table("""
alpha:a,beta:b,gamma:g,delta:d,epsilon:e,zeta:z,eta:h,theta:th,iota:i,kappa:k,lambda:l,mu:m,nu:n,xi:x,omicron:o,pi:p,rho:r,sigma:s,
tau:t,upsilon:u,phi:ph,chi:ch,psi:ps,omega:w
""")

MONTHS = "january february march april may june july august september october november december".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()

SPANISH = table("""
hello:hola,goodbye:adios,yes:si,no:no,please:por favor,thanks:gracias,water:agua,bread:pan,house:casa,dog:perro,cat:gato,book:libro,
friend:amigo,sun:sol,moon:luna,sea:mar,fire:fuego,earth:tierra,tree:arbol,flower:flor,bird:pajaro,fish:pez,milk:leche,wine:vino,
day:dia,night:noche,red:rojo,green:verde,blue:azul,white:blanco,black:negro,one:uno,two:dos,three:tres,four:cuatro,five:cinco,six:seis,
hand:mano,heart:corazon,head:cabeza
""")

GERMAN = table("""
hello:hallo,goodbye:tschuss,yes:ja,no:nein,please:bitte,thanks:danke,water:Wasser,bread:Brot,house:Haus,dog:Hund,cat:Katze,book:Buch,
friend:Freund,sun:Sonne,moon:Mond,sea:Meer,fire:Feuer,earth:Erde,tree:Baum,flower:Blume,bird:Vogel,fish:Fisch,milk:Milch,wine:Wein,
day:Tag,night:Nacht,red:rot,green:grun,blue:blau,white:weiss,black:schwarz,one:eins,two:zwei,three:drei,four:vier,five:funf,six:sechs,
hand:Hand,heart:Herz,head:Kopf
""")

FRENCH = table("""
hello:bonjour,goodbye:au revoir,yes:oui,no:non,please:s'il vous plait,thanks:merci,water:eau,bread:pain,house:maison,dog:chien,cat:chat,
book:livre,friend:ami,sun:soleil,moon:lune,sea:mer,fire:feu,earth:terre,tree:arbre,flower:fleur,bird:oiseau,fish:poisson,milk:lait,
wine:vin,day:jour,night:nuit,red:rouge,green:vert,blue:bleu,white:blanc,black:noir,one:un,two:deux,three:trois,four:quatre,five:cinq,
six:six,hand:main,heart:coeur,head:tete
""")

STATES = table("""
alabama:AL,alaska:AK,arizona:AZ,arkansas:AR,california:CA,colorado:CO,connecticut:CT,delaware:DE,florida:FL,georgia:GA,hawaii:HI,
idaho:ID,illinois:IL,indiana:IN,iowa:IA,kansas:KS,kentucky:KY,louisiana:LA,maine:ME,maryland:MD,michigan:MI,minnesota:MN,missouri:MO,
montana:MT,nebraska:NE,nevada:NV,ohio:OH,oklahoma:OK,oregon:OR,texas:TX,utah:UT,vermont:VT,virginia:VA,washington:WA,wyoming:WY
""")

# name: (what it does, the table, how it is asked besides the key alone)
LOOKUPS = {
    "capital": ("a country's capital", {c[0]: c[1] for c in COUNTRIES}, ("capital of {K}?", "what is the capital of {K}?")),
    "country-of": ("the country of a capital", {c[1].lower(): c[0].capitalize() for c in COUNTRIES}, ("where is {K}?", "{K} is in")),
    "currency": ("a country's currency", {c[0]: c[2] for c in COUNTRIES}, ("money of {K}?", "how do they pay in {K}?")),
    "country-code": ("a country's code of two letters", {c[0]: c[3] for c in COUNTRIES}, ("code of {K}?", "{K} in short")),
    "continent": ("a country's continent", {c[0]: c[4] for c in COUNTRIES}, ("continent of {K}?", "where is {K}?")),
    "element": ("an element's symbol", ELEMENTS, ("symbol of {k}?", "{k} in short")),
    "element-name": ("the element of a symbol", {v.lower(): k for k, v in ELEMENTS.items()}, ("what is {K}?", "element {K}")),
    "atomic-number": ("an element's number", ATOMIC_NUMBERS, ("number of {k}?", "where is {k}?")),
    "opposite": ("the opposite", OPPOSITES, ("opposite of {k}?", "not {k} but")),
    "young-animal": ("what an animal's young is called", YOUNG, ("young of a {k}?", "a young {k}")),
    "animal-sound": ("what an animal says", SOUNDS, ("what does the {k} say?", "the {k} says")),
    "plural": ("the plural", PLURALS, ("two of {k}?", "many: {k}")),
    "past-tense": ("the past tense", PAST, ("yesterday i {k}", "past of {k}?")),
    "colour-hex": ("a colour's code", COLOURS, ("code of {k}?", "paint it {k}")),
    "greek": ("a Greek letter in ours", GREEK, ("letter {k}?", "write {k}")),
    "month-number": ("a month's number", {m: str(i + 1) for i, m in enumerate(MONTHS)}, (
        "number of {K}?", "in {K}", "{K} 2024", "{k} please", "when is {K}?", "{k}!", "month {k}")),
    "next-month": ("the month after", {m: MONTHS[(i + 1) % 12] for i, m in enumerate(MONTHS)}, (
        "after {K}?", "in {K}", "{K} 2024", "{k} please", "when is {K}?", "{k}!", "month {k}")),
    "next-day": ("the day after", {d: DAYS[(i + 1) % 7] for i, d in enumerate(DAYS)}, (
        "after {K}?", "on {K}", "{K} morning", "{k} please", "today is {K}", "{k}!", "day {k}", "it is {k}", "{K} night", "last {K}")),
    "spanish": ("an English word in Spanish", SPANISH, ("{k} in Spanish?", "say {k}")),
    "german": ("an English word in German", GERMAN, ("{k} in German?", "say {k}")),
    "french": ("an English word in French", FRENCH, ("{k} in French?", "say {k}")),
    "us-state": ("a state's two letters", STATES, ("code of {K}?", "{K} in short")),
}
