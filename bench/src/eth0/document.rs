//! The table in `docs/eth0.md`: written between two markers, the words around it are people's.

use super::{Difference, Expected};

const BEGIN: &str = "<!-- table: BLESS=1 scripts/eth0-test -->";
const END: &str = "<!-- end of table -->";

/// The document with the table of these differences in place of the old one.
///
/// # Errors
/// When it has no markers.
pub fn write_table(document: &str, expected: &Expected, observables: usize) -> Result<String, String> {
    let (before, rest) = document.split_once(BEGIN).ok_or_else(|| format!("no line {BEGIN}"))?;
    let (_, after) = rest.split_once(END).ok_or_else(|| format!("no line {END}"))?;
    Ok(format!("{before}{BEGIN}\n{}{END}{after}", table(expected, observables)))
}

fn table(expected: &Expected, observables: usize) -> String {
    let count = expected.rows().count();
    let mut text =
        format!("{count} of {observables} observables differ.\n\n| observable | tap | dreamwire |\n|---|---|---|\n");
    let mut heading = "";
    for (cause, Difference { key, tap, dreamwire }) in expected.rows() {
        if cause != heading {
            heading = cause;
            text.push_str(&format!("| **{}** | | |\n", escape(cause)));
        }
        text.push_str(&format!("| `{key}` | {} | {} |\n", escape(tap), escape(dreamwire)));
    }
    text
}

fn escape(cell: &str) -> String {
    cell.replace('|', "\\|").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_table_is_replaced() {
        let expected = Expected::parse("[cause]\nkey\ta|b\t—\n").unwrap();
        let old = format!("# Title\n\n{BEGIN}\nold\n{END}\n\nwords\n");
        let new = write_table(&old, &expected, 7).unwrap();
        assert_eq!(
            new,
            format!(
                "# Title\n\n{BEGIN}\n1 of 7 observables differ.\n\n| observable | tap | dreamwire |\n|---|---|---|\n\
                 | **cause** | | |\n| `key` | a\\|b | — |\n{END}\n\nwords\n"
            )
        );
        assert_eq!(write_table(&new, &expected, 7).unwrap(), new);
        assert!(write_table("no markers", &expected, 7).is_err());
    }
}
