//! What to say to someone who asks for an adapter that is not there.

/// As many names as fit a line; a pack may have thousands.
const SHOWN: usize = 8;
/// Most names that differ equally little from what was asked for.
const SIMILAR: usize = 3;

/// The names closest to `wanted` if any is close, or else what there is.
///
/// ```
/// use lory_models::adapter::unknown_name;
/// assert_eq!(unknown_name("peot", &["chef", "poet"]), "did you mean `poet`?");
/// assert_eq!(unknown_name("x", &["chef", "poet"]), "there are chef, poet");
/// ```
pub fn unknown_name(wanted: &str, names: &[&str]) -> String {
    let similar = similar(wanted, names);
    match names.len() {
        0 => "there is none".to_owned(),
        _ if !similar.is_empty() => {
            let quoted: Vec<String> = similar.iter().map(|n| format!("`{n}`")).collect();
            format!("did you mean {}?", quoted.join(" or "))
        }
        n if n <= SHOWN => format!("there are {}", names.join(", ")),
        n => format!("there are {n}: {} …", names[..SHOWN].join(", ")),
    }
}

/// The names with the fewest typing mistakes between them and `wanted`, out of those with no more than one in three letters.
fn similar<'a>(wanted: &str, names: &[&'a str]) -> Vec<&'a str> {
    let letters = |s: &str| -> Vec<char> { s.chars().flat_map(char::to_lowercase).collect() };
    let wanted = letters(wanted);
    let most = (wanted.len() / 3).min(SIMILAR);
    let mistakes = |n: &&'a str| Some((mistakes(&wanted, &letters(n), most)?, *n));
    let mut found: Vec<(usize, &str)> = names.iter().filter_map(mistakes).collect();
    found.sort();
    let least = found.first().map(|f| f.0);
    found.into_iter().take_while(|f| Some(f.0) == least).map(|f| f.1).take(SIMILAR).collect()
}

/// Letters to insert, delete, replace or exchange with their neighbour to get from `a` to `b` (optimal string alignment);
/// `None` for more than `most`.
fn mistakes(a: &[char], b: &[char], most: usize) -> Option<usize> {
    if a.len().abs_diff(b.len()) > most {
        return None;
    }
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let mut least = (last[j] + usize::from(x != y)).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                least = least.min(before[j - 1] + 1);
            }
            row.push(least);
        }
        // Later rows are never below the least of two in a row.
        if row.iter().chain(&last).all(|n| *n > most) {
            return None;
        }
        (before, last) = (last, row);
    }
    last.last().copied().filter(|n| *n <= most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_mistakes_are_counted() {
        let count =
            |a: &str, b: &str| mistakes(&a.chars().collect::<Vec<_>>(), &b.chars().collect::<Vec<_>>(), 3);
        for (a, b, want) in [
            ("poet", "poet", Some(0)),
            ("poet", "peot", Some(1)),
            ("poet", "poets", Some(1)),
            ("poet", "", None),
            ("", "", Some(0)),
            ("kitten", "sitting", Some(3)),
            ("abcdefgh", "hgfedcba", None),
        ] {
            assert_eq!(count(a, b), want, "{a} {b}");
            assert_eq!(count(b, a), want, "{b} {a}");
        }
    }

    #[test]
    fn the_closest_are_named() {
        let names: Vec<String> = (0..10).map(|i| format!("adapter-{i:05}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert_eq!(unknown_name("ADAPTER-0007", &names), "did you mean `adapter-00007`?");
        assert!(unknown_name("adapter-0000x", &names).contains("` or `"));
        assert!(unknown_name("poet", &names).starts_with("there are 10: adapter-00000, "));
        assert_eq!(unknown_name("ab", &["cd"]), "there are cd");
        assert_eq!(unknown_name("", &[]), "there is none");
    }
}
