//! `docs/mapping.md` names tests that are there.

use std::path::Path;

const TABLES: &str = include_str!("../../docs/mapping.md");

/// The last cell of each row, and the row.
fn rows() -> impl Iterator<Item = (&'static str, &'static str)> {
    let rows = TABLES.lines().filter(|line| line.starts_with("| "));
    rows.filter_map(|row| Some((row.trim_end_matches(['|', ' ']).rsplit('|').next()?.trim(), row)))
}

#[test]
fn each_row_names_tests_that_exist_or_says_that_there_is_none() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut rows_with_tests = 0;
    for (tests, row) in rows().filter(|(tests, _)| *tests != "tests" && !tests.starts_with("none")) {
        let mut code = None;
        let mut named = 0;
        for word in tests.split('`').skip(1).step_by(2) {
            if word.ends_with(".rs") {
                let read = std::fs::read_to_string(root.join(word));
                code = Some(read.unwrap_or_else(|error| panic!("{word}: {error} in {row}")));
                continue;
            }
            let code = code.as_ref().unwrap_or_else(|| panic!("no file before {word} in {row}"));
            let begin = code.find(&format!("fn {word}(")).unwrap_or_else(|| panic!("no test {word} in {row}"));
            // Its attribute stands in the lines before it.
            let before: Vec<&str> = code[..begin].lines().rev().take(3).collect();
            assert!(before.iter().any(|line| line.contains("test")), "{word} is no test in {row}");
            named += 1;
        }
        assert!(named > 0, "neither a test nor `none` in {row}");
        rows_with_tests += 1;
    }
    assert!(rows_with_tests > 40, "{rows_with_tests} rows with tests");
}
