//! Line plots as SVG, just enough for the report: axes, ticks, a legend.

use std::fmt::Write;

/// One line of a plot.
pub(crate) struct Line<'a> {
    pub name: &'a str,
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 45.0;
const COLOURS: [&str; 7] = ["#1b6ca8", "#d1495b", "#3c8d2f", "#8e5ea2", "#e08e0b", "#4b4b4b", "#17a2a2"];

/// A plot of lines over a linear or logarithmic x axis; y begins at 0.
pub(crate) fn svg(title: &str, x_name: &str, y_name: &str, log_x: bool, lines: &[Line<'_>]) -> String {
    let scale = |x: f64| if log_x { x.max(1e-12).log2() } else { x };
    let points = || lines.iter().flat_map(|l| l.points.iter());
    let low = points().map(|p| scale(p.0)).fold(f64::INFINITY, f64::min);
    let high = points().map(|p| scale(p.0)).fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = match high > low {
        true => (low, high),
        // One point, or none: any range that holds it.
        false if low.is_finite() => (low - 0.5, low + 0.5),
        false => (0.0, 1.0),
    };
    let top = nice(points().map(|p| p.1).fold(0.0, f64::max));
    let px = |x: f64| LEFT + (scale(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT);
    let py = |y: f64| HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    text(&mut out, LEFT, 18.0, "start", title);
    for i in 0..=5 {
        let y = top * f64::from(i) / 5.0;
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"#ddd\"/>",
            WIDTH - RIGHT,
            py(y),
            py(y)
        );
        text(&mut out, LEFT - 6.0, py(y) + 4.0, "end", &short(y));
        let at = low + (high - low) * f64::from(i) / 5.0;
        let x = if log_x { at.exp2() } else { at };
        text(&mut out, px(x), HEIGHT - BOTTOM + 16.0, "middle", &short(x));
    }
    text(&mut out, (LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 10.0, "middle", x_name);
    text(&mut out, 8.0, TOP - 2.0, "start", y_name);
    for (i, line) in lines.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let path: Vec<String> =
            line.points.iter().map(|p| format!("{:.1},{:.1}", px(p.0), py(p.1))).collect();
        let _ = writeln!(
            out,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\" points=\"{}\"/>",
            path.join(" ")
        );
        let y = TOP + 14.0 * i as f64 + 8.0;
        let x = WIDTH - RIGHT + 10.0;
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{:.1}\" width=\"12\" height=\"3\" fill=\"{colour}\"/>",
            y - 4.0
        );
        text(&mut out, x + 18.0, y, "start", line.name);
    }
    out.push_str("</svg>\n");
    out
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>");
}

/// The next of 1, 2, 5 times a power of ten.
fn nice(value: f64) -> f64 {
    if value.is_nan() || value <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|n| *n >= value).unwrap_or(value)
}

fn short(x: f64) -> String {
    match x {
        0.0 => "0".into(),
        x if x >= 10.0 => format!("{x:.0}"),
        x if x >= 1.0 => format!("{x:.1}"),
        x => format!("{x:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_stay_inside_and_names_are_escaped() {
        let lines = [
            Line { name: "a<b", points: vec![(1.0, 0.2), (64.0, 0.9)] },
            Line { name: "none", points: vec![] },
        ];
        let plot = svg("t & t", "rank", "err²", true, &lines);
        assert!(plot.contains("a&lt;b") && plot.contains("t &amp; t"));
        assert!(plot.contains("points=\"60.0,"), "{plot}");
        assert!(!plot.contains("NaN") && !plot.contains("inf"));
        assert!(!svg("", "", "", false, &[]).contains("NaN"));
    }
}
