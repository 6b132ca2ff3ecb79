//! Every input that fuzzing found worth keeping, without a fuzzer.

use std::path::Path;

use ioregion_fuzz::TARGETS;

#[test]
fn inputs_that_were_kept_find_nothing() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, target) in TARGETS {
        let mut inputs = 0;
        for entry in std::fs::read_dir(corpus.join(name)).unwrap() {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            target(&std::fs::read(path).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "nothing is kept for {name}");
    }
}
