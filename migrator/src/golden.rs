//! Golden files: bytes that must never change within a version of a format. `GOLDEN=write cargo test` makes missing ones.

use std::fmt::Write;
use std::path::PathBuf;

/// The bytes of `tests/golden/v2/<name>.hex`.
pub(crate) fn bytes(name: &str) -> Vec<u8> {
    let text = std::fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v2").join(format!("{name}.hex"))
}

/// Compares bytes with `tests/golden/v2/<name>.hex`.
pub(crate) fn check(name: &str, bytes: &[u8]) {
    let path = path(name);
    let mut text = String::new();
    for line in bytes.chunks(16) {
        for byte in line {
            write!(text, "{byte:02x} ").unwrap();
        }
        text.pop();
        text.push('\n');
    }
    if std::env::var_os("GOLDEN").is_some() && !path.exists() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(text, golden, "{name} no longer has the bytes of its golden file");
}
