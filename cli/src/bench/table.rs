//! Results in the formats of llama-bench: Markdown for people, the others for programs.

use std::io::{Write, stderr, stdout};

use clap::ValueEnum;
use serde_json::{Map, Value};

use crate::{failure::Outcome, progress::Measured};

/// What results are printed as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table for people.
    Md,
    /// A line of names, then one line for each result.
    Csv,
    /// One array of objects, with every sample.
    Json,
    /// One object a line, with every sample.
    Jsonl,
    /// A table definition and insertions.
    Sql,
}

/// Where results go, and as what.
#[derive(Clone, Copy)]
pub struct Formats {
    /// On the standard output.
    pub output: Format,
    /// On the standard error as well.
    pub errors: Option<Format>,
    /// See [`Measured::new`].
    pub progress: bool,
}

/// A cell of the Markdown table.
pub struct Cell {
    /// The column.
    pub name: &'static str,
    /// What stands in it.
    pub text: String,
    /// Its width, unless name or text need more.
    pub width: usize,
}

impl Cell {
    /// A cell; an empty width is the name's.
    pub fn new(name: &'static str, text: impl Into<String>, width: usize) -> Cell {
        Cell { name, text: text.into(), width: width.max(name.chars().count()) }
    }
}

/// Prints results one by one, as they come.
pub struct Table {
    /// What people see meanwhile.
    pub progress: Measured,
    output: Sheet,
    errors: Option<Sheet>,
}

/// Results in one format.
struct Sheet {
    format: Format,
    /// Columns of CSV that the first row lacks.
    later: &'static [&'static str],
    /// Name and columns of what was printed last; other ones begin another table.
    columns: (&'static str, Vec<String>),
    rows: usize,
}

impl Table {
    /// `later` are columns that rows after the first may have, too: CSV says all its columns at once.
    pub fn new(formats: Formats, later: &'static [&'static str]) -> Table {
        Table {
            progress: Measured::new(formats.progress),
            output: Sheet::new(formats.output, later),
            errors: formats.errors.map(|format| Sheet::new(format, later)),
        }
    }

    /// One result: all its fields, and what people see of them; `name` is the table that it stands in in SQL, where rows
    /// of one name have the same columns.
    pub fn row(&mut self, name: &'static str, fields: &Map<String, Value>, cells: &[Cell]) -> Outcome {
        let output = self.output.row(name, fields, cells);
        let errors = self.errors.as_mut().map(|sheet| sheet.row(name, fields, cells));
        Ok(self.progress.print(|| print(&output, errors.as_deref()))?)
    }

    /// What stands after the last result.
    pub fn finish(self) -> Outcome {
        self.progress.clear();
        Ok(print(self.output.end(), self.errors.as_ref().map(Sheet::end))?)
    }
}

fn print(output: &str, errors: Option<&str>) -> std::io::Result<()> {
    let mut out = stdout().lock();
    out.write_all(output.as_bytes())?;
    out.flush()?;
    // Like any other message: who closed it does not want it.
    let _ = errors.map(|text| stderr().lock().write_all(text.as_bytes()));
    Ok(())
}

impl Sheet {
    fn new(format: Format, later: &'static [&'static str]) -> Sheet {
        Sheet { format, later, columns: ("", Vec::new()), rows: 0 }
    }

    fn row(&mut self, name: &'static str, fields: &Map<String, Value>, cells: &[Cell]) -> String {
        let text = match self.format {
            Format::Md => self.markdown(cells),
            Format::Csv => self.csv(fields),
            Format::Json => format!("{}\n{}", if self.rows == 0 { "[" } else { "," }, indented(fields)),
            Format::Jsonl => format!("{}\n", Value::Object(fields.clone())),
            Format::Sql => self.sql(name, fields),
        };
        self.rows += 1;
        text
    }

    fn end(&self) -> &'static str {
        match (self.format, self.rows) {
            (Format::Json, 0) => "[]\n",
            (Format::Json, _) => "\n]\n",
            _ => "",
        }
    }

    /// Whether these columns are not those of the row before.
    fn are_new(&mut self, name: &'static str, columns: Vec<String>) -> bool {
        let columns = (name, columns);
        let new = self.columns != columns;
        self.columns = columns;
        new
    }

    fn markdown(&mut self, cells: &[Cell]) -> String {
        let mut text = String::new();
        if self.are_new("", cells.iter().map(|c| c.name.to_owned()).collect()) {
            if self.rows > 0 {
                text.push('\n');
            }
            let line = |f: &dyn Fn(&Cell) -> String| cells.iter().map(f).collect::<String>();
            text += &line(&|c| format!("| {} ", padded(c, c.name)));
            text += "|\n";
            text += &line(&|c| match is_left(c.name) {
                true => format!("| {} ", "-".repeat(c.width)),
                false => format!("| {}: ", "-".repeat(c.width - 1)),
            });
            text += "|\n";
        }
        cells.iter().for_each(|c| text += &format!("| {} ", padded(c, &c.text)));
        text + "|\n"
    }

    fn csv(&mut self, fields: &Map<String, Value>) -> String {
        let mut text = String::new();
        if self.rows == 0 {
            let (mut columns, _) = scalars(fields);
            columns.extend(self.later.iter().map(|c| (*c).to_owned()));
            text = columns.join(",") + "\n";
            self.columns.1 = columns;
        }
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        let value = |column: &String| quoted(&fields.get(column).map(plain).unwrap_or_default());
        text + &self.columns.1.iter().map(value).collect::<Vec<_>>().join(",") + "\n"
    }

    fn sql(&mut self, name: &'static str, fields: &Map<String, Value>) -> String {
        let (columns, values) = scalars(fields);
        let literal = |v: &&Value| match v {
            Value::String(s) => format!("'{}'", s.replace('\'', "''")),
            Value::Null => "NULL".to_owned(),
            Value::Bool(b) => u8::from(*b).to_string(),
            other => other.to_string(),
        };
        let list = values.iter().map(literal).collect::<Vec<_>>().join(", ");
        let insert = format!("INSERT INTO {name} ({}) VALUES ({list});\n", columns.join(", "));
        let kind = |v: &&Value| match v {
            Value::Number(n) if n.is_f64() => "REAL",
            Value::Number(_) | Value::Bool(_) => "INTEGER",
            // What is absent here is a figure in other rows.
            Value::Null => "NUMERIC",
            _ => "TEXT",
        };
        let definitions: Vec<String> =
            columns.iter().zip(&values).map(|(c, v)| format!("  {c} {}", kind(v))).collect();
        if self.are_new(name, columns) {
            format!("CREATE TABLE IF NOT EXISTS {name} (\n{}\n);\n\n{insert}", definitions.join(",\n"))
        } else {
            insert
        }
    }
}

/// Names and test names are read from the left, numbers from the right.
fn is_left(name: &str) -> bool {
    matches!(name, "model" | "backend" | "test" | "adapters")
}

fn padded(cell: &Cell, text: &str) -> String {
    let space = " ".repeat(cell.width.saturating_sub(text.chars().count()));
    if is_left(cell.name) { format!("{text}{space}") } else { format!("{space}{text}") }
}

/// Samples are for JSON only.
fn scalars(fields: &Map<String, Value>) -> (Vec<String>, Vec<&Value>) {
    fields.iter().filter(|(_, v)| !v.is_array() && !v.is_object()).map(|(k, v)| (k.clone(), v)).unzip()
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn indented(fields: &Map<String, Value>) -> String {
    let lines: Vec<String> =
        fields.iter().map(|(k, v)| format!("    {}: {v}", Value::from(k.as_str()))).collect();
    format!("  {{\n{}\n  }}", lines.join(",\n"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(name: &str) -> Map<String, Value> {
        let Value::Object(map) = json!({ "model": name, "n": 3, "t": 1.5, "s": [1, 2] }) else { panic!() };
        map
    }

    #[test]
    fn csv_and_sql_quote_what_could_end_a_value() {
        let mut table = Sheet::new(Format::Csv, &["later"]);
        assert_eq!(
            table.csv(&fields("a \"b\", c")),
            "model,n,t,later\n\"a \"\"b\"\", c\",\"3\",\"1.5\",\"\"\n"
        );
        table.rows = 1;
        let Value::Object(other) = json!({ "model": "x", "later": 2 }) else { panic!() };
        assert_eq!(table.csv(&other), "\"x\",\"\",\"\",\"2\"\n");
        let sql = Sheet::new(Format::Sql, &[]).sql("lory_bench", &fields("it's"));
        assert!(sql.contains("  model TEXT,\n  n INTEGER,\n  t REAL\n"), "{sql}");
        assert!(sql.ends_with("INSERT INTO lory_bench (model, n, t) VALUES ('it''s', 3, 1.5);\n"), "{sql}");
    }

    #[test]
    fn markdown_repeats_its_header_only_for_other_columns() {
        let mut table = Sheet::new(Format::Md, &[]);
        let cells = |test: &str| [Cell::new("test", test, 6), Cell::new("t/s", "1.00", 8)];
        assert_eq!(
            table.markdown(&cells("pp1")),
            "| test   |      t/s |\n| ------ | -------: |\n| pp1    |     1.00 |\n"
        );
        assert_eq!(table.markdown(&cells("tg12345")), "| tg12345 |     1.00 |\n");
    }
}
