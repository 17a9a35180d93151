//! The `generation` tag: Hugging Face's templates mark with it which text the assistant wrote, for training. For rendering
//! it does nothing, but the engine knows no tags besides its own.

/// Replaces `{% generation %}` and `{% endgeneration %}` by a block that is always taken, so that white space control around
/// it works as written. Comments, raw blocks and strings are left alone.
pub(super) fn rewrite(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        let (before, tail) = rest.split_at(start);
        out.push_str(before);
        let end = match tail.as_bytes().get(1) {
            Some(b'#') => tail.find("#}").map_or(tail.len(), |i| i + 2),
            Some(b'{') => 2 + end_of_code(&tail[2..], "}}"),
            Some(b'%') => {
                let end = 2 + end_of_code(&tail[2..], "%}");
                if tag_name(&tail[..end]) == "raw" { end + end_of_raw(&tail[end..]) } else { end }
            }
            _ => 1,
        };
        let (block, after) = tail.split_at(end);
        match tag_name(block) {
            "generation" => out.push_str(&block.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&block.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(block),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Where the code that `text` begins with ends, behind `close`; strings are skipped.
fn end_of_code(text: &str, close: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (i, c) in text.char_indices() {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(q) if c == q => quote = None,
            Some(_) => {}
            None if text[i..].starts_with(close) => return i + close.len(),
            None if c == '"' || c == '\'' => quote = Some(c),
            None => {}
        }
    }
    text.len()
}

/// Where a raw block's `endraw` tag ends.
fn end_of_raw(text: &str) -> usize {
    let mut at = 0;
    while let Some(found) = text[at..].find("{%") {
        let start = at + found;
        let end = start + text[start..].find("%}").map_or(text.len() - start, |i| i + 2);
        if tag_name(&text[start..end]) == "endraw" {
            return end;
        }
        at = start + 2;
    }
    text.len()
}

/// The first word of a `{% … %}` tag, if it is one; a tag with arguments is not a bare name.
fn tag_name(block: &str) -> &str {
    let Some(inner) = block.strip_prefix("{%").and_then(|b| b.strip_suffix("%}")) else { return "" };
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    inner.strip_suffix(['-', '+']).unwrap_or(inner).trim()
}

#[cfg(test)]
mod tests {
    use super::rewrite;

    #[test]
    fn tags_keep_their_white_space_control() {
        let source = "a {%- generation -%} b {%+endgeneration%} c";
        assert_eq!(rewrite(source), "a {%- if true -%} b {%+endif%} c");
    }

    #[test]
    fn nothing_else_changes() {
        for source in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{% raw %}{% generation %}{% endraw %}",
            "{% set x = \"%} {% generation %}\" %}",
            "{% generation",
            "{",
            "{% set generation = 1 %}{{ generation }}",
            "{%",
            "é{é{% raw %}{%",
        ] {
            assert_eq!(rewrite(source), source);
        }
    }
}
