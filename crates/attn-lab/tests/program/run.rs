use super::{attn, inputs, save, text, with};
use attn_core::registry::{NamedTensor, Options, TensorData};
use attn_lab::{registry, tensors};

#[test]
fn a_file_goes_through_as_a_library_call_does() {
    let folder = tempfile::tempdir().unwrap();
    let input = save(folder.path(), "in.safetensors", &inputs());
    for (variant, set) in [("flash", "causal=true"), ("naive", "scale=0.5"), ("sliding-window", "window=3")] {
        let output = folder.path().join("out.safetensors");
        let args = ["run", "--variant", variant, "--set", set, "--input", &input, "--output", &text(&output)];
        let ended = attn(args);
        assert!(ended.status.success(), "{variant}: {}", String::from_utf8_lossy(&ended.stderr));
        let options = Options::parse([set]).unwrap();
        let wanted = registry::get(variant).unwrap().run(&options, &inputs()).unwrap();
        assert_eq!(tensors::load(&output).unwrap(), wanted, "{variant}");
    }
}

#[test]
fn a_mask_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let seen: Vec<u8> = (0..17 * 21).map(|at| u8::from(at % 3 == 0)).collect();
    let mask = NamedTensor { shape: vec![17, 21], data: TensorData::U8(seen) };
    let masked = with(inputs(), "mask", mask);
    let input = save(folder.path(), "in.safetensors", &masked);
    let output = text(&folder.path().join("out.safetensors"));
    assert!(attn(["run", "--variant", "flash", "--input", &input, "--output", &output]).status.success());
    let got = tensors::load(output.as_ref()).unwrap();
    let flash = registry::get("flash").unwrap();
    assert_eq!(got, flash.run(&Options::new(), &masked).unwrap());
    assert_ne!(got, flash.run(&Options::new(), &inputs()).unwrap());
}

#[test]
fn nan_goes_through_when_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let mut with_nan = inputs();
    let TensorData::F32(q) = &mut with_nan.0.get_mut("q").unwrap().data else { panic!("f32") };
    q[0] = f32::NAN;
    let input = save(folder.path(), "in.safetensors", &with_nan);
    let output = text(&folder.path().join("out.safetensors"));
    let ended = attn(["run", "--variant", "flash", "--allow-nan", "--input", &input, "--output", &output]);
    assert!(ended.status.success());
    let Some(NamedTensor { data: TensorData::F32(o), .. }) =
        tensors::load(output.as_ref()).unwrap().0.remove("o")
    else {
        panic!("no output")
    };
    assert!(o[..5].iter().all(|x| x.is_nan()) && o[5..].iter().all(|x| x.is_finite()), "row 0 alone is NaN");
}
