//! The main job end to end, at sizes that take a second.

use assert_cmd::Command;
use std::path::Path;

fn attn(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("attn").expect("cargo builds the binary for this test");
    command.arg("sweep").args(args);
    command
}

fn text(folder: &Path) -> String {
    let path = folder.join("text.txt");
    let words = ["attention ", "is ", "what ", "a ", "query ", "pays ", "to ", "keys;\n"];
    let line = |i: usize| words[(i * i + i / 3) % words.len()];
    std::fs::write(&path, (0..600).map(line).collect::<String>()).unwrap();
    path.display().to_string()
}

fn lines(folder: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(folder.join("results.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_file_is_written_and_a_second_run_repeats_nothing() {
    for source in ["gauss", "lm", "planted"] {
        let folder = tempfile::tempdir().unwrap();
        let (out, book) = (folder.path().join("out").display().to_string(), text(folder.path()));
        let mut args =
            vec!["--n", "256..512", "--variants", "flash,sliding-window", "--source", source, "--out", &out];
        args.extend(["--set", "sliding-window.window=32", "--threads", "2"]);
        if source == "lm" {
            args.extend(["--text", &book]);
        }
        let first = attn(&args).assert().success().get_output().stdout.clone();
        let first = String::from_utf8(first).unwrap();
        assert!(first.contains("flash") && first.contains("report.html"), "{first}");
        assert_eq!(first.contains("quality gate"), source == "lm", "{first}");

        let out = Path::new(&out);
        let rows = lines(out);
        assert_eq!(rows.len(), 4, "two variants at two lengths");
        for row in &rows {
            assert_eq!((&row["status"], &row["source"]), (&"measured".into(), &source.into()), "{row}");
            let (error, exact) = (row["error"]["rel_l2"].as_f64().unwrap(), row["variant"] == "flash");
            assert!(if exact { error < 1e-4 } else { error > 1e-3 }, "{row}");
            assert!(row["extra_bytes"].as_u64().is_some() && row["runs"].as_u64() >= Some(5), "{row}");
        }
        for file in ["results.csv", "env.json", "report.html"] {
            assert!(out.join(file).metadata().unwrap().len() > 300, "{file}");
        }
        assert!(!out.join("inputs.safetensors").exists(), "inputs are removed");

        let before = std::fs::read(out.join("results.jsonl")).unwrap();
        let second = attn(&args).assert().success().get_output().stdout.clone();
        assert!(String::from_utf8(second).unwrap().contains("4 of 4 points were known"));
        assert_eq!(std::fs::read(out.join("results.jsonl")).unwrap(), before);
        let other_seed = [&args[..], &["--seed", "9"]].concat();
        attn(&other_seed).assert().success();
        assert_eq!(lines(out).len(), 8, "another seed is another case; the old ones stay");
    }
}

#[test]
fn what_is_over_the_budget_is_reported_with_its_figures() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().display().to_string();
    let args =
        ["--n", "256,64k", "--variants", "naive", "--source", "gauss", "--point-budget", "1", "--out", &out];
    let shown = attn(&args).assert().success().get_output().stdout.clone();
    assert!(String::from_utf8(shown).unwrap().contains("not run (predicted "));
    let rows = lines(folder.path());
    assert_eq!(
        rows.iter().map(|row| row["status"].as_str().unwrap()).collect::<Vec<_>>(),
        ["measured", "not-run"]
    );
    assert!(rows[1]["predicted_seconds"].as_f64().unwrap() > 1.0, "{}", rows[1]);
}

#[test]
fn bad_input_is_one_line_and_results_survive() {
    let folder = tempfile::tempdir().unwrap();
    let (out, book) = (folder.path().join("out").display().to_string(), text(folder.path()));
    let good = ["--n", "64", "--variants", "flash", "--source", "gauss", "--out", &out];
    attn(&good).assert().success();
    let file = folder.path().join("file").display().to_string();
    std::fs::write(&file, "in the way").unwrap();
    let cases: [(&[&str], &str); 6] = [
        (&["--n", "8k..1k"], "backwards"),
        (&["--variants", "flush"], "flash"),
        (&["--n", "1m", "--text", &book], "1048576"),
        (&["--source", "file", "--input", "absent.safetensors"], "absent.safetensors"),
        (&["--set", "flash.x=1", "--source", "gauss"], "`x`"),
        (&["--out", &file, "--source", "gauss", "--n", "64"], "cannot create"),
    ];
    for (bad, word) in cases {
        let args = if bad.contains(&"--out") { bad.to_vec() } else { [bad, &["--out", &out]].concat() };
        let output = attn(&args).assert().code(2).get_output().clone();
        let complaint = String::from_utf8(output.stderr).unwrap();
        assert!(complaint.lines().count() == 1 && complaint.contains(word), "{bad:?}: {complaint}");
        assert_eq!(lines(Path::new(&out)).len(), 1, "{bad:?}");
    }
}
