//! Stop strings in a stream of text pieces.

/// Finds the first of several strings in text that arrives in pieces, and holds back only what
/// may yet turn out to be the beginning of one.
///
/// What it releases and where it stops does not depend on how the text is cut into pieces: of
/// several strings the one that is complete first wins, and of those that end at the same place
/// the longest.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

/// What one piece of text brought about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Released {
    /// Text that is certainly not part of a stop string.
    pub text: String,
    /// Whether a stop string was found. It and all text after it is dropped.
    pub stopped: bool,
}

impl StopMatcher {
    /// A matcher for `stops`; an empty string among them never matches.
    pub fn new(stops: &[String]) -> Self {
        StopMatcher { stops: stops.to_vec(), ..StopMatcher::default() }
    }

    /// Takes the next piece. After a stop string nothing is released any more.
    pub fn push(&mut self, piece: &str) -> Released {
        if self.stopped {
            return Released { text: String::new(), stopped: true };
        }
        self.held.push_str(piece);
        let rest = match self.find() {
            Some(start) => {
                self.stopped = true;
                self.held.truncate(start);
                String::new()
            }
            None => self.held.split_off(self.held.len() - self.undecided()),
        };
        Released { text: std::mem::replace(&mut self.held, rest), stopped: self.stopped }
    }

    /// The text ends with `last`: returns it with what was held back, up to a stop string.
    pub fn finish(&mut self, last: &str) -> String {
        let text = self.push(last).text;
        text + &std::mem::take(&mut self.held)
    }

    /// Start of the match that ends first.
    fn find(&self) -> Option<usize> {
        let stops = self.stops.iter().filter(|s| !s.is_empty());
        let found = stops.filter_map(|s| self.held.find(s.as_str()).map(|at| (at + s.len(), at)));
        found.min().map(|(_, at)| at)
    }

    /// Length of the longest end of the held text with which a stop string begins.
    fn undecided(&self) -> usize {
        let longest = |s: &String| {
            let most = s.len().saturating_sub(1).min(self.held.len());
            (1..=most).rev().find(|&n| self.held.as_bytes().ends_with(&s.as_bytes()[..n]))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut matcher = StopMatcher::new(&stops);
        let mut text = String::new();
        for piece in pieces {
            let released = matcher.push(piece);
            text.push_str(&released.text);
        }
        text.push_str(&matcher.finish(""));
        (text, matcher.stopped)
    }

    #[test]
    fn finds_a_stop_across_pieces() {
        assert_eq!(run(&["User:"], &["Hello\nUs", "er", ": hi"]), ("Hello\n".into(), true));
        assert_eq!(run(&["User:"], &["Hello\nUs", "ual"]), ("Hello\nUsual".into(), false));
        assert_eq!(run(&["END", "\n\n"], &["a\n", "\nEND"]), ("a".into(), true));
        assert_eq!(run(&[""], &["a", "b"]), ("ab".into(), false));
    }

    #[test]
    fn holds_back_only_what_could_become_a_stop() {
        let mut m = StopMatcher::new(&["###".into(), "héé".into()]);
        assert_eq!(m.push("abc#").text, "abc");
        assert_eq!(m.push("#").text, "");
        assert_eq!(m.push("x").text, "##x");
        assert_eq!(m.push("hé").text, "");
        assert_eq!(m.push("è").text, "héè");
        // A shared first byte of a character is no reason to hold it back.
        assert_eq!(m.push("h").text, "");
        assert_eq!(m.finish(""), "h");
        assert_eq!(m.finish(""), "");
    }

    #[test]
    fn the_end_may_complete_a_stop_and_nothing_follows_one() {
        let mut m = StopMatcher::new(&["END".into()]);
        assert_eq!(m.push("aEN").text, "a");
        assert_eq!(m.finish("D!"), "");
        assert_eq!(m.push("x"), Released { text: String::new(), stopped: true });
        let mut m = StopMatcher::new(&["END".into()]);
        m.push("aEN");
        assert_eq!(m.finish("?"), "EN?");
    }

    #[test]
    fn a_stop_may_begin_inside_a_false_start() {
        assert_eq!(run(&["aab"], &["a", "a", "a", "b", "c"]), ("a".into(), true));
        assert_eq!(run(&["abab!"], &["ab", "ab", "ab", "!"]), ("ab".into(), true));
    }

    #[test]
    fn the_cut_into_pieces_makes_no_difference() {
        let stops = ["ab", "bca", "cc", "aéb"];
        for text in ["xabca", "bcbca", "aaéab", "accc", "aaéb", "bcxaé", "ccab", "abcabc"] {
            let whole = run(&stops, &[text]);
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let single: Vec<&str> = chars.iter().map(String::as_str).collect();
            assert_eq!(run(&stops, &single), whole, "{text}");
            for at in (1..text.len()).filter(|&i| text.is_char_boundary(i)) {
                assert_eq!(run(&stops, &[&text[..at], &text[at..]]), whole, "{text} cut at {at}");
            }
        }
    }
}
