//! Many rows in one statement, in few lengths, so that there are few statements to prepare.

use super::{StoreError, Tx};

/// The sizes in which many rows are written or looked up at once; a full transaction has 50 events.
pub(super) const CHUNKS: [usize; 8] = [100, 50, 32, 16, 8, 4, 2, 1];

/// Cuts `items` into pieces whose lengths are all in [`CHUNKS`].
pub(super) fn chunks<T>(mut items: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = CHUNKS.into_iter().find(|size| *size <= items.len())?;
        let (chunk, rest) = items.split_at_checked(size)?;
        items = rest;
        Some(chunk)
    })
}

/// `(b+1, b+2, …), (…)`: placeholders for `rows` rows of `columns` columns after the first `before`.
pub(super) fn placeholders(rows: usize, columns: usize, before: usize) -> String {
    let mut sql = String::with_capacity(rows * columns * 5);
    for row in 0..rows {
        sql.push_str(if row == 0 { "(" } else { ", (" });
        for column in 1..=columns {
            if column > 1 {
                sql.push_str(", ");
            }
            sql.push('$');
            sql.push_str(&(before + row * columns + column).to_string());
        }
        sql.push(')');
    }
    sql
}

/// One statement for so many rows, as each database reads it quickest.
pub(super) struct Statement {
    rows: usize,
    postgres: String,
    sqlite: String,
}

/// One statement for each size of [`CHUNKS`]. Its placeholders must stand in the order of their numbers.
pub(super) fn statements(sql: impl Fn(usize) -> String) -> Vec<Statement> {
    let both = |rows| {
        let postgres = sql(rows);
        Statement { rows, sqlite: unnumbered(&postgres), postgres }
    };
    CHUNKS.into_iter().map(both).collect()
}

/// The same with a bare `?` for each placeholder: SQLite keeps the others in a list of names, which it searches from the start
/// for each value that is bound.
fn unnumbered(sql: &str) -> String {
    let mut parts = sql.split('$');
    let mut bare = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        bare.push('?');
        bare.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    bare
}

/// The statement for a chunk of so many rows.
pub(super) fn statement(statements: &'static [Statement], tx: &Tx, rows: usize) -> Result<&'static str, StoreError> {
    let found = statements.iter().find(|statement| statement.rows == rows);
    let found = found.ok_or_else(|| StoreError::corrupt("statement", rows))?;
    Ok(if tx.backend_name() == "SQLite" { &found.sqlite } else { &found.postgres })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_everything_in_order_in_few_lengths() {
        let items: Vec<usize> = (0..150).collect();
        let lengths: Vec<usize> = chunks(&items).map(<[usize]>::len).collect();
        assert_eq!(lengths, [100, 50]);
        assert_eq!(chunks(&items).flatten().copied().collect::<Vec<_>>(), items);
    }

    #[test]
    fn placeholders_count_on() {
        assert_eq!(placeholders(2, 2, 0), "($1, $2), ($3, $4)");
        assert_eq!(placeholders(1, 3, 1), "($2, $3, $4)");
        assert_eq!(unnumbered("a = $1 AND b IN ($2, $31);"), "a = ? AND b IN (?, ?);");
        assert_eq!(unnumbered("COMMIT"), "COMMIT");
    }
}
