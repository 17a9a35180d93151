//! Two texts side by side, or one after the other where the terminal is too narrow.

use console::measure_text_width;

/// Narrowest column in which text is pleasant to read.
const NARROWEST: usize = 30;
/// Between the columns.
const GAP: &str = " │ ";

/// Lays out two titled texts for a terminal of `width` columns; `None` is no terminal.
pub fn lay_out(titles: [&str; 2], texts: [&str; 2], width: Option<usize>) -> String {
    let column = width.map_or(0, |w| w.saturating_sub(measure_text_width(GAP)) / 2);
    if column < NARROWEST {
        return format!("[{}]\n{}\n\n[{}]\n{}\n", titles[0], texts[0].trim(), titles[1], texts[1].trim());
    }
    let mut columns = [Vec::new(), Vec::new()];
    for (side, lines) in columns.iter_mut().enumerate() {
        lines.push(cut(titles[side], column));
        lines.push("─".repeat(column));
        lines.extend(wrap(texts[side].trim(), column));
    }
    let [left, right] = columns;
    let mut out = String::new();
    for i in 0..left.len().max(right.len()) {
        let (l, r) = (left.get(i).map_or("", |s| s), right.get(i).map_or("", |s| s));
        let padding = " ".repeat(column - measure_text_width(l));
        out.push_str(format!("{l}{padding}{GAP}{r}").trim_end());
        out.push('\n');
    }
    out
}

/// Lines of at most `width` columns, broken between words where there is a gap.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.split('\n') {
        let mut line = String::new();
        for word in paragraph.split(' ') {
            let joined = if line.is_empty() { word.to_owned() } else { format!("{line} {word}") };
            if measure_text_width(&joined) <= width {
                line = joined;
                continue;
            }
            if !line.is_empty() {
                lines.push(std::mem::take(&mut line));
            }
            line = word.to_owned();
            while measure_text_width(&line) > width {
                let head = cut(&line, width);
                // A character wider than the column goes through as it is.
                let taken = head.len().max(line.chars().next().map_or(1, char::len_utf8));
                lines.push(line[..taken].to_owned());
                line = line[taken..].to_owned();
            }
        }
        lines.push(line);
    }
    lines
}

/// The beginning of `text` that fits `width` columns.
fn cut(text: &str, width: usize) -> String {
    let mut head = String::new();
    let mut used = 0;
    for c in text.chars() {
        used += measure_text_width(c.encode_utf8(&mut [0; 4]));
        if used > width {
            break;
        }
        head.push(c);
    }
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_stand_side_by_side_on_a_wide_terminal() {
        let long = "one two three four five six seven eight nine ten";
        let out = lay_out(["A", "B"], [long, "short"], Some(73));
        let lines: Vec<&str> = out.lines().collect();
        assert!(lines[0].starts_with("A ") && lines[0].ends_with("│ B"), "{out}");
        assert_eq!(lines[2], "one two three four five six seven   │ short");
        assert_eq!(lines[3], "eight nine ten                      │");
    }

    #[test]
    fn texts_follow_each_other_otherwise() {
        for width in [None, Some(40)] {
            assert_eq!(lay_out(["A", "B"], [" x ", "y"], width), "[A]\nx\n\n[B]\ny\n");
        }
    }

    #[test]
    fn wide_characters_count_twice_and_long_words_are_cut() {
        assert_eq!(wrap("日本語日本語", 4), ["日本", "語日", "本語"]);
        assert_eq!(wrap("abcdefgh ij", 3), ["abc", "def", "gh", "ij"]);
        assert_eq!(wrap("日", 1), ["日", ""]);
        assert_eq!(wrap("a\n\nb", 5), ["a", "", "b"]);
    }
}
