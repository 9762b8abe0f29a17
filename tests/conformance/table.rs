//! `docs/conformance.md` names every check and no other, and tests that are there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use isthmus::conformance::catalogue;

use super::each_check_can_fail::passing_faults;

const TABLE: &str = include_str!("../../docs/conformance.md");

/// The rows of the table.
fn rows() -> impl Iterator<Item = Vec<&'static str>> {
    let rows = TABLE.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| |"));
    rows.map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
}

#[test]
fn every_check_has_a_row_and_every_row_checks_that_exist() {
    let there: BTreeSet<&str> = catalogue().iter().map(|check| check.id).collect();
    assert_eq!(there.len(), catalogue().len(), "a number is given twice");
    let mut named = BTreeSet::new();
    for row in rows() {
        assert_eq!(row.len(), 7, "{row:?}");
        let (checks, why_not) = (row[4], row[6]);
        assert!(checks != "—" || !row[5].is_empty() || !why_not.is_empty(), "neither checked nor explained: {row:?}");
        named.extend(checks.split(", ").filter(|check| *check != "—"));
    }
    let known = TABLE.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').filter(|word| word.starts_with("LM-"));
    assert_eq!(named, there);
    assert_eq!(known.filter(|word| !there.contains(word)).collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn every_test_that_is_named_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut code = String::new();
    for folder in ["src", "tests"] {
        read(&root.join(folder), &mut code);
    }
    for row in rows() {
        for name in row[5].split('`').skip(1).step_by(2).filter(|name| !name.contains('/')) {
            assert!(code.contains(&format!("fn {name}(")), "{name}");
        }
    }
}

/// Each rule has a row, and each row of a rule a check, or a word why there is none.
#[test]
fn every_authorization_rule_has_a_row_and_what_checks_it_stands_there() {
    let mut rules = BTreeSet::new();
    for code in [
        include_str!("../../src/lm/rules/mod.rs"),
        include_str!("../../src/lm/rules/member.rs"),
        include_str!("../../src/lm/rules/power_levels.rs"),
    ] {
        let is_rule = |text: &&str| text.starts_with(|c: char| c.is_ascii_digit()) && text.split('.').all(is_number);
        for line in code.lines() {
            // Those that forbid are named in refusals, those that allow beside what they allow.
            rules.extend(line.split('"').skip(1).step_by(2).filter(is_rule));
            let allowing = line.split("// rule ").nth(1).map(|rest| rest.split([' ', ':', ',']).next().unwrap());
            rules.extend(allowing.filter(is_rule));
        }
    }
    assert!(rules.contains("5.2.6") && rules.contains("5.2.4") && rules.len() > 40, "{rules:?}");
    let mut of_rule = BTreeMap::new();
    for row in rows() {
        let Some(rule) = row[1].strip_prefix("int-auth-rules ") else { continue };
        assert!(row[4] != "—" || !row[6].is_empty(), "nothing looks at it, and nobody says why: {row:?}");
        assert!(of_rule.insert(rule, row[4]).is_none(), "two rows of the rule {rule}");
    }
    assert_eq!(of_rule.keys().copied().collect::<BTreeSet<_>>(), rules);
    for check in catalogue() {
        let Some(rule) = check.section.strip_prefix("int-auth-rules ") else { continue };
        let there = of_rule.get(rule).is_some_and(|checks| checks.split(", ").any(|id| id == check.id));
        assert!(there, "{} is not in the row of the rule {rule}", check.id);
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn read(folder: &Path, code: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, code);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            code.push_str(&std::fs::read_to_string(&path).unwrap());
        }
    }
}

/// By a fault of its own, in the tests of the suite: named there, or one of many of a kind.
#[test]
fn every_check_is_made_to_fail() {
    let tests = [include_str!("each_check_can_fail.rs"), include_str!("tls.rs")].concat();
    let of_a_kind: BTreeSet<&str> = passing_faults().iter().map(|(id, _)| *id).collect();
    let is_made_to = |id: &str| of_a_kind.contains(id) || tests.contains(&format!("\"{id}\""));
    let never = catalogue().into_iter().map(|check| check.id).filter(|id| !is_made_to(id));
    assert_eq!(never.collect::<Vec<_>>(), Vec::<&str>::new());
}
