//! All integration tests: one binary, a module a file.
