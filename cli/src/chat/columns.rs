//! Texts side by side, or one after the other where the terminal is too narrow.

use console::measure_text_width;

/// Narrowest column in which a long text is pleasant to read.
const NARROWEST: usize = 30;
/// Between the columns.
const GAP: &str = " │ ";

/// Lays out titled texts for a terminal of `width` columns; `None` is no terminal.
pub fn lay_out(titled: &[(&str, &str)], width: Option<usize>) -> String {
    let gaps = measure_text_width(GAP) * titled.len().saturating_sub(1);
    let column = width.map_or(0, |w| w.saturating_sub(gaps) / titled.len().max(1));
    let widest = |text: &str| text.lines().map(measure_text_width).max().unwrap_or(0);
    let fit = titled.iter().all(|(title, text)| widest(title).max(widest(text.trim())) <= column);
    if column < NARROWEST && (column == 0 || !fit) {
        let blocks: Vec<String> =
            titled.iter().map(|(title, text)| format!("[{title}]\n{}\n", text.trim())).collect();
        return blocks.join("\n");
    }
    let columns: Vec<Vec<String>> = titled
        .iter()
        .map(|(title, text)| {
            let head = [cut(title, column), "─".repeat(column)];
            head.into_iter().chain(wrap(text.trim(), column)).collect()
        })
        .collect();
    let mut out = String::new();
    for i in 0..columns.iter().map(Vec::len).max().unwrap_or(0) {
        let cell = |lines: &Vec<String>| {
            let text = lines.get(i).map_or("", |s| s);
            format!("{text}{}", " ".repeat(column.saturating_sub(measure_text_width(text))))
        };
        out.push_str(columns.iter().map(cell).collect::<Vec<_>>().join(GAP).trim_end());
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
        let out = lay_out(&[("A", long), ("B", "short")], Some(73));
        let lines: Vec<&str> = out.lines().collect();
        assert!(lines[0].starts_with("A ") && lines[0].ends_with("│ B"), "{out}");
        assert_eq!(lines[2], "one two three four five six seven   │ short");
        assert_eq!(lines[3], "eight nine ten                      │");
    }

    #[test]
    fn texts_follow_each_other_otherwise() {
        for width in [None, Some(8)] {
            assert_eq!(lay_out(&[("A", " x "), ("B", "y y")], width), "[A]\nx\n\n[B]\ny y\n");
        }
    }

    #[test]
    fn short_texts_fit_narrow_columns() {
        let out = lay_out(&[("rot13", "uryyb"), ("upper", "HELLO"), ("none", "")], Some(30));
        assert_eq!(
            out,
            "rot13    │ upper    │ none\n──────── │ ──────── │ ────────\nuryyb    │ HELLO    │\n"
        );
        assert!(lay_out(&[("a", "long enough"), ("b", "x"), ("c", "x")], Some(30)).starts_with("[a]\n"));
    }

    #[test]
    fn wide_characters_count_twice_and_long_words_are_cut() {
        assert_eq!(wrap("日本語日本語", 4), ["日本", "語日", "本語"]);
        assert_eq!(wrap("abcdefgh ij", 3), ["abc", "def", "gh", "ij"]);
        assert_eq!(wrap("日", 1), ["日", ""]);
        assert_eq!(wrap("a\n\nb", 5), ["a", "", "b"]);
    }
}
