//! The differences that are known and explained: a file of rows under headings, one heading per cause.
//!
//! ```text
//! # Comments and blank lines are kept at the top only.
//! [a cause, in a few words; docs/eth0.md has the same as a heading]
//! key <TAB> value on tap <TAB> value on dreamwire
//! ```

use std::collections::BTreeMap;

use super::Difference;

/// Where rows land that no cause has been found for yet. They fail the test until somebody moves them.
const UNEXPLAINED: &str = "unexplained";

/// Rows under their causes, in the order of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    preface: String,
    causes: Vec<Cause>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Cause {
    name: String,
    rows: Vec<Difference>,
}

/// How differences compare with the expected ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Not expected, or with other values than expected.
    pub new: Vec<Difference>,
    /// Expected, and no longer there.
    pub gone: Vec<Difference>,
    /// Expected, but nobody has said why.
    pub unexplained: Vec<Difference>,
}

impl Judgement {
    /// Whether every difference is expected and explained, and every expected one is there.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.new.is_empty() && self.gone.is_empty() && self.unexplained.is_empty()
    }
}

impl Expected {
    /// Reads a file.
    ///
    /// # Errors
    /// With the number of the line that cannot be read.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut expected = Self::default();
        for (index, line) in text.lines().enumerate() {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                expected.causes.push(Cause { name: name.to_owned(), rows: Vec::new() });
                continue;
            }
            match expected.causes.last_mut() {
                None => expected.preface.push_str(&format!("{line}\n")),
                Some(_) if line.is_empty() => {}
                Some(cause) => cause.rows.push(
                    parse_row(line)
                        .ok_or_else(|| format!("line {}: not \"key TAB tap TAB dreamwire\": {line}", index + 1))?,
                ),
            }
        }
        Ok(expected)
    }

    /// The file's text.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = format!("{}\n", self.preface.trim_end());
        for Cause { name, rows } in &self.causes {
            text.push_str(&format!("\n[{name}]\n"));
            for Difference { key, tap, dreamwire } in rows {
                text.push_str(&format!("{key}\t{tap}\t{dreamwire}\n"));
            }
        }
        text
    }

    /// Compares what was found with it.
    #[must_use]
    pub fn judge(&self, found: &[Difference]) -> Judgement {
        let missing = |row: &&Difference| !found.contains(row);
        Judgement {
            new: found.iter().filter(|row| !self.rows().any(|(_, known)| known == *row)).cloned().collect(),
            gone: self.rows().map(|(_, row)| row).filter(missing).cloned().collect(),
            unexplained: self.rows().filter(|(cause, _)| *cause == UNEXPLAINED).map(|(_, row)| row.clone()).collect(),
        }
    }

    /// Takes over what was found: known keys stay with their cause, new ones are unexplained, causes without rows go.
    #[must_use]
    pub fn bless(&self, found: &[Difference]) -> Self {
        let cause_of: BTreeMap<&str, &str> = self.rows().map(|(cause, row)| (row.key.as_str(), cause)).collect();
        let rows_of = |name: &str| {
            let of = |row: &&Difference| cause_of.get(row.key.as_str()).copied().unwrap_or(UNEXPLAINED) == name;
            found.iter().filter(of).cloned().collect::<Vec<_>>()
        };
        let mut names: Vec<_> = self.causes.iter().map(|cause| cause.name.as_str()).collect();
        if !names.contains(&UNEXPLAINED) {
            names.push(UNEXPLAINED);
        }
        let causes = names.into_iter().map(|name| Cause { name: name.to_owned(), rows: rows_of(name) });
        Self { preface: self.preface.clone(), causes: causes.filter(|cause| !cause.rows.is_empty()).collect() }
    }

    /// Every row with its cause.
    pub fn rows(&self) -> impl Iterator<Item = (&str, &Difference)> {
        self.causes.iter().flat_map(|cause| cause.rows.iter().map(|row| (cause.name.as_str(), row)))
    }
}

fn parse_row(line: &str) -> Option<Difference> {
    let mut cells = line.split('\t');
    let row = Difference {
        key: cells.next()?.to_owned(),
        tap: cells.next()?.to_owned(),
        dreamwire: cells.next()?.to_owned(),
    };
    cells.next().is_none().then_some(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str =
        "# What is known.\n\n[no offloads]\nbit.0\t1\t0\nbit.1\t1\t0\n\n[no filter]\nunicast\tlost\tseen\n";

    fn row(key: &str, tap: &str, dreamwire: &str) -> Difference {
        Difference { key: key.to_owned(), tap: tap.to_owned(), dreamwire: dreamwire.to_owned() }
    }

    #[test]
    fn a_file_survives_reading_and_writing() {
        assert_eq!(Expected::parse(FILE).unwrap().render(), FILE);
        assert_eq!(
            Expected::parse("[a]\nrow without tabs").unwrap_err(),
            "line 2: not \"key TAB tap TAB dreamwire\": row without tabs"
        );
    }

    #[test]
    fn new_gone_and_changed_differences_all_fail() {
        let expected = Expected::parse(FILE).unwrap();
        let known = [row("bit.0", "1", "0"), row("bit.1", "1", "0"), row("unicast", "lost", "seen")];
        assert!(expected.judge(&known).is_good());

        let judgement = expected.judge(&[known[0].clone(), row("unicast", "lost", "late"), row("x", "1", "2")]);
        assert_eq!(judgement.new, [row("unicast", "lost", "late"), row("x", "1", "2")]);
        assert_eq!(judgement.gone, [known[1].clone(), known[2].clone()]);
    }

    #[test]
    fn blessing_keeps_causes_and_leaves_new_rows_unexplained() {
        let blessed = Expected::parse(FILE).unwrap().bless(&[row("bit.0", "1", "?"), row("x", "1", "2")]);
        assert_eq!(blessed.render(), "# What is known.\n\n[no offloads]\nbit.0\t1\t?\n\n[unexplained]\nx\t1\t2\n");
        let judgement = blessed.judge(&[row("bit.0", "1", "?"), row("x", "1", "2")]);
        assert_eq!((judgement.new.len(), judgement.gone.len(), judgement.unexplained.len()), (0, 0, 1));
        assert!(!judgement.is_good());
    }
}
