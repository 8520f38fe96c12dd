use std::path::PathBuf;

use crate::lm::{BOS, LlamaLike, LmError, Tokenizer, llama2c};

fn testdata(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

fn model() -> LlamaLike {
    llama2c::load(&testdata("stories260K.bin")).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&testdata("tok512.bin")).unwrap()
}

#[test]
fn greedy_decoding_tells_the_known_story() {
    let want = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, \
                she saw a big, red ball. She wanted to play with it, but it was too high.";
    let tokenizer = tokenizer();
    let ids = model().continue_greedily(&[BOS], 100).unwrap();
    let story = String::from_utf8(tokenizer.decode(&ids)).unwrap();
    assert!(story.starts_with(want), "{story}");
    let encoded = tokenizer.encode(want.as_bytes());
    assert_eq!(encoded, ids[..encoded.len()]);
}

#[test]
fn merges_equal_those_found_by_searching_all_pairs() {
    let tokenizer = tokenizer();
    let text = "She wanted to see the  big dog, \u{e9}\u{4e16} and aaaaaaa the the\n\"Yes!\"";
    let bytes = [text.as_bytes(), &[0xFF, b'a']].concat();
    let ids = tokenizer.encode(&bytes);
    assert_eq!(tokenizer.decode(&ids), bytes);

    let mut slow = tokenizer.characters(&bytes);
    loop {
        let pairs = slow
            .windows(2)
            .enumerate()
            .filter_map(|(at, pair)| tokenizer.joined(pair[0], pair[1]).map(|(id, score)| (at, id, score)));
        let best = pairs.fold(None::<(usize, u32, f32)>, |best, pair| match best {
            Some(best) if best.2 >= pair.2 => Some(best),
            _ => Some(pair),
        });
        let Some((at, id, _)) = best else { break };
        slow.splice(at..at + 2, [id]);
    }
    assert_eq!(ids[1..], slow);
}

#[test]
fn the_empty_text_is_one_token() {
    assert_eq!(tokenizer().encode(b""), [BOS]);
    assert_eq!(tokenizer().decode(&[BOS]), b"");
}

#[test]
fn files_of_another_kind_are_refused() {
    let bytes = std::fs::read(testdata("stories260K.bin")).unwrap();
    let refuse = |bytes: &[u8]| matches!(llama2c::parse(bytes, "file"), Err(LmError::Format { .. }));
    assert!(refuse(b""));
    assert!(refuse(&[0; 28]));
    assert!(refuse(&[0xFF; 400]));
    assert!(refuse(&bytes[..bytes.len() - 4]));
    assert!(refuse(&[&bytes[..], &[0; 4]].concat()));
    assert!(Tokenizer::parse(b"abc", "file").is_err());
    assert!(Tokenizer::parse(&[0xFF; 64], "file").is_err());
}

#[test]
fn bad_tokens_and_layers_are_errors() {
    let model = model();
    assert!(model.capture_layer(&[], 0).unwrap_err().to_string().contains("no tokens"));
    assert!(model.capture_layer(&[512], 0).unwrap_err().to_string().contains("ids 0 to 511"));
    assert!(model.capture_layer(&[1], 5).unwrap_err().to_string().contains("layers 0 to 4"));
    assert!(model.next_logits(&[]).is_err());
}
