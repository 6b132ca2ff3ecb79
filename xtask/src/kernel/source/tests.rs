use super::*;
use std::time::{Duration, SystemTime};

fn patch(name: &str, text: &str) -> Patch {
    Patch {
        name: name.into(),
        text: text.into(),
    }
}

const FIRST: &str = "From: x\nSubject: first\n\n--- text that is no file\n\
    diff --git a/virt/a.c b/virt/a.c\n--- a/virt/a.c\n+++ b/virt/a.c\n\
    @@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n";
const SECOND: &str = "diff --git a/virt/a.c b/virt/a.c\n--- a/virt/a.c\n+++ b/virt/a.c\n\
    @@ -1,3 +1,3 @@\n one\n 2\n-three\n+3\n\
    diff --git a/new.c b/new.c\nnew file mode 100644\n--- /dev/null\n+++ b/new.c\n\
    @@ -0,0 +1 @@\n+new\n\
    diff --git a/old.c b/old.c\ndeleted file mode 100644\n--- a/old.c\n+++ /dev/null\n\
    @@ -1 +0,0 @@\n-old\n";

fn tree(dir: &Path) -> Tree {
    let tree = Tree {
        dir: dir.join("tree"),
        pristine: dir.join("tree.pristine"),
    };
    write(&tree.dir.join("virt/a.c"), b"one\ntwo\nthree\n").unwrap();
    write(&tree.dir.join("old.c"), b"old\n").unwrap();
    tree
}

fn contents(tree: &Tree, file: &str) -> Option<String> {
    let bytes = read(&tree.dir.join(file)).unwrap();
    bytes.map(|bytes| String::from_utf8(bytes).unwrap())
}

#[test]
fn series_is_applied_in_order_and_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree(dir.path());
    let (first, second) = (patch("1.patch", FIRST), patch("2.patch", SECOND));
    tree.apply(&[first.clone(), second]).unwrap();
    assert_eq!(contents(&tree, "virt/a.c").unwrap(), "one\n2\n3\n");
    assert_eq!(contents(&tree, "new.c").unwrap(), "new\n");
    assert_eq!(contents(&tree, "old.c"), None);

    tree.apply(&[first]).unwrap();
    assert_eq!(contents(&tree, "virt/a.c").unwrap(), "one\n2\nthree\n");
    assert_eq!(contents(&tree, "new.c"), None);
    assert_eq!(contents(&tree, "old.c").unwrap(), "old\n");

    tree.apply(&[]).unwrap();
    assert_eq!(contents(&tree, "virt/a.c").unwrap(), "one\ntwo\nthree\n");
}

#[test]
fn files_that_stay_the_same_keep_their_time() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree(dir.path());
    let (first, second) = (patch("1.patch", FIRST), patch("2.patch", SECOND));
    tree.apply(&[first.clone(), second.clone()]).unwrap();
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    for name in ["virt/a.c", "new.c"] {
        let file = fs::File::options()
            .write(true)
            .open(tree.dir.join(name))
            .unwrap();
        file.set_modified(old).unwrap();
    }
    // The same series under other names, with another message.
    let first = patch("0001.patch", &FIRST.replace("first", "better said"));
    let second = patch("2.patch", &SECOND.replace("+new", "+newer"));
    tree.apply(&[first, second]).unwrap();
    let time = |file| {
        fs::metadata(tree.dir.join(file))
            .unwrap()
            .modified()
            .unwrap()
    };
    assert_eq!(time("virt/a.c"), old);
    assert_ne!(time("new.c"), old);
}

#[test]
fn patch_that_does_not_apply_is_named_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let tree = tree(dir.path());
    let first = patch("1.patch", FIRST);
    tree.apply(std::slice::from_ref(&first)).unwrap();
    let stale = patch("2-stale.patch", &SECOND.replace(" 2\n", " other\n"));
    let error = tree.apply(&[first, stale]).unwrap_err().to_string();
    assert!(
        error.contains("2-stale.patch") && error.contains("virt/a.c"),
        "{error}"
    );
    assert_eq!(contents(&tree, "virt/a.c").unwrap(), "one\n2\nthree\n");
    assert_eq!(contents(&tree, "new.c"), None);
}

#[test]
fn what_is_no_patch_or_leaves_the_tree_is_refused() {
    for text in [
        "just words\n",
        "diff --git a/../x b/../x\n",
        "diff --git a//etc/x b//etc/x\n",
        "diff --git a/x\n",
        "diff --git x y\n",
    ] {
        let error = patch("1.patch", text).files().unwrap_err().to_string();
        assert!(error.contains("1.patch"), "{error}");
    }
}

#[test]
fn series_is_read_in_the_order_of_names() {
    let dir = tempfile::tempdir().unwrap();
    assert!(series(&dir.path().join("none")).unwrap().is_empty());
    for name in ["0002-b.patch", "0001-a.patch", "README"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    let names: Vec<String> = series(dir.path())
        .unwrap()
        .into_iter()
        .map(|patch| patch.name)
        .collect();
    assert_eq!(names, ["0001-a.patch", "0002-b.patch"]);
}

#[test]
fn newest_package_is_chosen_by_number() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(LTS.newest(dir.path()), None);
    let put = |line: Line, version| {
        let name = format!("{}_{version}_all.deb", line.package);
        fs::write(dir.path().join(name), "").unwrap();
    };
    for version in ["6.12.99-1", "6.12.117-1~deb12u1", "6.12.107-1~deb12u1"] {
        put(LTS, version);
    }
    fs::write(dir.path().join("other_9.0_all.deb"), "").unwrap();
    assert_eq!(NEXT.newest(dir.path()), None);
    put(NEXT, "7.3.4-1~bpo13+1");
    for (line, version) in [(LTS, "6.12.117-1~deb12u1"), (NEXT, "7.3.4-1~bpo13+1")] {
        let newest = line.newest(dir.path()).unwrap();
        assert_eq!(line.version_of(&newest), Some(version));
    }
}
