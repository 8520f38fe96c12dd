use super::{attn, json, stdout};
use attn_lab::registry;

#[test]
fn json_has_every_variant_with_its_options_and_profile() {
    let listed = json(&attn(["list", "--json"]));
    let listed = listed.as_array().unwrap();
    let entries = registry::all();
    assert_eq!(listed.len(), entries.len());
    for (shown, entry) in listed.iter().zip(&entries) {
        assert_eq!(shown["name"], entry.name);
        assert_eq!(shown["family"], entry.family.to_string());
        assert_eq!(shown["summary"], entry.summary);
        assert_eq!(shown["options"].as_array().unwrap().len(), entry.options.len(), "{}", entry.name);
        assert!(shown["options"].as_array().unwrap().iter().all(|o| o["name"].is_string()), "{}", entry.name);
        assert!(shown["profile"]["max_error"].is_number(), "{}", entry.name);
    }
}

#[test]
fn a_family_is_a_part() {
    let linear = json(&attn(["list", "--json", "--family", "linear"]));
    let names: Vec<&str> = linear.as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"retnet") && !names.contains(&"flash"), "{names:?}");
}

#[test]
fn the_table_names_every_variant() {
    let table = stdout(&attn(["list"]));
    for entry in registry::all() {
        assert!(table.contains(entry.name), "{}", entry.name);
    }
}
