//! What is kept in `fuzz/corpus` and `fuzz/regressions`, given to the targets without libFuzzer (docs/fuzzing.md): an input that once
//! broke something must not break it again.
#![allow(clippy::unwrap_used)] // Clippy's exception for tests does not reach their helpers.

use std::collections::BTreeSet;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

#[path = "../fuzz/src/lib.rs"]
mod targets;

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder);
    let Ok(entries) = folder.read_dir() else { return Vec::new() };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn replay(target: &str) {
    let corpus = files(&format!("corpus/{target}"));
    assert!(!corpus.is_empty(), "{target} has no corpus: scripts/fuzz --target {target} --minimize makes one");
    let fails = |file: &PathBuf| {
        let data = std::fs::read(file).unwrap();
        catch_unwind(|| targets::run(target, &data)).is_err()
    };
    let failed: Vec<_> = corpus.into_iter().chain(files(&format!("regressions/{target}"))).filter(fails).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

macro_rules! replays {
    ($($target:ident)*) => {
        $(#[test] fn $target() { replay(stringify!($target)); })*

        #[test]
        fn every_target_has_a_test_a_program_and_no_folders_but_these() {
            let tested = BTreeSet::from([$(stringify!($target).to_owned()),*]);
            let names = |files: Vec<PathBuf>| -> BTreeSet<String> {
                files.iter().map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
            };
            assert_eq!(tested, targets::TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect());
            assert_eq!(tested, names(files("fuzz_targets")));
            assert_eq!(tested, names(files("corpus")));
            assert!(names(files("regressions")).is_subset(&tested));
        }
    };
}

replays!(bitmap boot journal machines pages ports spec state virtio wire);
