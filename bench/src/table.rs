//! Tables as aligned terminal text or as Markdown.

/// A table of text cells; rows may be shorter than the header.
#[derive(Debug, Clone, Default)]
pub struct Table {
    title: String,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows. A header that starts with `>` aligns its column right.
    pub fn new(title: &str, header: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let header = header.into_iter().map(Into::into).collect();
        Self {
            title: title.into(),
            header,
            rows: vec![],
        }
    }

    /// Appends a row.
    pub fn push(&mut self, row: impl IntoIterator<Item = String>) {
        self.rows.push(row.into_iter().collect());
    }

    /// What stands above it.
    pub fn title(&self) -> &str {
        &self.title
    }

    /// How many rows it has.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Whether it has no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Columns padded to equal width. Control characters, which a results file
    /// from elsewhere may hold, are shown as `?`.
    pub fn text(&self) -> String {
        let clean = |cell: &str| -> String {
            cell.chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect()
        };
        let (names, right) = self.columns();
        let rows: Vec<Vec<String>> = std::iter::once(names.clone())
            .chain(self.rows.iter().cloned())
            .map(|row| row.iter().map(|cell| clean(cell)).collect())
            .collect();
        let width = |column: usize| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..names.len()).map(width).collect();
        let mut lines: Vec<String> = rows
            .iter()
            .map(|row| {
                let pad = |((cell, &width), &right): ((&String, &usize), &bool)| {
                    if right {
                        format!("{cell:>width$}")
                    } else {
                        format!("{cell:<width$}")
                    }
                };
                let cells: Vec<String> = row.iter().zip(&widths).zip(&right).map(pad).collect();
                cells.join("  ").trim_end().to_owned()
            })
            .collect();
        lines.insert(
            1,
            widths
                .iter()
                .map(|&w| "─".repeat(w))
                .collect::<Vec<_>>()
                .join("  "),
        );
        format!("{}\n{}\n", clean(&self.title), lines.join("\n"))
    }

    /// A heading and a table in GitHub's Markdown. Cells cannot break out of it.
    pub fn markdown(&self) -> String {
        let (names, right) = self.columns();
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| escape(cell)).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let rule: Vec<&str> = right
            .iter()
            .map(|&r| if r { "--:" } else { "---" })
            .collect();
        let mut out = format!(
            "### {}\n\n{}|{}|\n",
            escape(&self.title),
            line(&names),
            rule.join("|")
        );
        self.rows.iter().for_each(|row| out += &line(row));
        out
    }

    fn columns(&self) -> (Vec<String>, Vec<bool>) {
        self.header
            .iter()
            .map(|name| {
                (
                    name.trim_start_matches('>').to_owned(),
                    name.starts_with('>'),
                )
            })
            .unzip()
    }
}

/// Makes text from a results file harmless inside Markdown.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '|' | '*' | '[' | ']' | '\\' => out.extend(['\\', c]),
            '<' => out += "&lt;",
            '&' => out += "&amp;",
            c if c.is_control() => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new("Title", ["name", ">ns"]);
        table.push(["a".into(), "1".into()]);
        table.push(["longer".into(), "1000".into()]);
        table
    }

    #[test]
    fn text_aligns_columns() {
        assert_eq!(
            table().text(),
            "Title\nname      ns\n──────  ────\na          1\nlonger  1000\n"
        );
    }

    #[test]
    fn markdown_aligns_columns() {
        assert_eq!(
            table().markdown(),
            "### Title\n\n| name | ns |\n|---|--:|\n| a | 1 |\n| longer | 1000 |\n"
        );
    }

    #[test]
    fn hostile_cells_stay_in_their_cell() {
        let mut table = Table::new("T", ["name"]);
        table.push(["x | y\n\u{1b}[31m<!-- results:end -->".into()]);
        assert!(
            table
                .markdown()
                .ends_with("| x \\| y??\\[31m&lt;!-- results:end --> |\n")
        );
        assert!(table.text().ends_with("x | y??[31m<!-- results:end -->\n"));
    }
}
