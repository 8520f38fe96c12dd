use std::path::Path;

use crate::lm::LmError;
use crate::lm::text::load;

fn library() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let files =
        [("b/two.rs", "two "), ("a.txt", "one "), ("c.md", "three"), ("b/x.bin", "no"), (".git/h.rs", "no")];
    for (path, content) in files {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    dir
}

#[test]
fn a_directory_is_read_sorted_by_path() {
    let dir = library();
    assert_eq!(load(dir.path(), 13).unwrap(), b"one two three");
    assert_eq!(load(dir.path(), 6).unwrap(), b"one tw");
    assert_eq!(load(dir.path(), 0).unwrap(), b"");
    assert_eq!(load(&dir.path().join("c.md"), 2).unwrap(), b"th");
}

#[test]
fn what_is_missing_is_said_with_the_flag_that_helps() {
    let dir = library();
    let error = load(dir.path(), 14).unwrap_err();
    assert!(matches!(error, LmError::TextTooShort { found: 13, asked: 14, .. }));
    let message = error.to_string();
    assert!(
        message.contains("13 bytes") && message.contains("14 asked") && message.contains("--text"),
        "{message}"
    );
    let empty = tempfile::tempdir().unwrap();
    let message = load(empty.path(), 1).unwrap_err().to_string();
    assert!(message.contains("no text file") && message.contains("--text"), "{message}");
    let message = load(Path::new("/nowhere/at/all"), 1).unwrap_err().to_string();
    assert!(message.contains("/nowhere/at/all"), "{message}");
}
