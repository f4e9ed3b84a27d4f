use super::*;
use serde_json::json;

fn lesson(number: &str, minutes: &[u32]) -> Lesson {
    let section = |(place, minutes): (usize, &u32)| Section {
        heading: format!("Part {place}"),
        minutes: *minutes,
    };
    Lesson {
        number: number.into(),
        title: format!("Title {number}"),
        file: format!("{number}_x.ipynb"),
        sections: minutes.iter().enumerate().map(section).collect(),
    }
}

#[test]
fn a_day_has_breaks_and_lunch() {
    let lessons = [("01", 60), ("02", 40), ("03", 70), ("04", 30), ("05", 30)];
    let lessons = lessons.map(|(number, minutes)| lesson(number, &[minutes]));
    let all: Vec<&Lesson> = lessons.iter().collect();
    let wanted = "\
| from | until | |
|---|---|---|
| 09:00 | 10:00 | 01 [Title 01](01_x.ipynb) |
| 10:00 | 10:40 | 02 [Title 02](02_x.ipynb) |
| 10:40 | 10:55 | *break* |
| 10:55 | 12:05 | 03 [Title 03](03_x.ipynb) |
| 12:05 | 13:05 | *lunch* |
| 13:05 | 13:35 | 04 [Title 04](04_x.ipynb) |
| 13:35 | 14:05 | 05 [Title 05](05_x.ipynb) |
";
    assert_eq!(day(&all, 14 * 60 + 5).unwrap(), wanted);
    let late = day(&all, 14 * 60).unwrap_err().to_string();
    assert!(late.contains("ends at 14:05"), "{late}");
}

#[test]
fn the_page_keeps_what_people_wrote() {
    let page = format!("before\n{BEGIN}old\n{END}after\n");
    let new = renewed(&page, "new").unwrap();
    assert_eq!(new, format!("before\n{BEGIN}\nnew\n{END}after\n"));
    assert_eq!(renewed(&new, "new").unwrap(), new);
    assert!(renewed("nothing", "new").is_err());
    assert!(renewed(BEGIN, "new").is_err());
}

#[test]
fn how_an_exercise_stands_is_what_its_check_has_printed() {
    let dir = tempfile::tempdir().unwrap();
    let state = |printed: &str| {
        let cell = |kind: &str, source: &str, tag: &str| {
            json!({"cell_type": kind, "source": source, "metadata": {"tags": [tag]},
                   "outputs": [{"output_type": "stream", "text": [printed]}]})
        };
        let cells = json!([
            cell("code", "", "starter-f"),
            cell("code", "", "check-f"),
            cell("markdown", "```rust\n```", "solution-f"),
        ]);
        let path = dir.path().join("01_x.ipynb");
        fs::write(&path, json!({"cells": cells, "metadata": {}}).to_string()).unwrap();
        let notebook = Notebook::read(&path).unwrap();
        State::of(&notebook.exercises().unwrap()[0])
    };
    assert_eq!(state("✓ Exercise f: all 2 cases right.\n"), State::Solved);
    let text = "○ Not yet: f (3 of 12 right). First to look at: (1 of 2 right)\n";
    assert_eq!(state(text), State::NotYet(3, 12));
    assert_eq!(state(""), State::NotRun);
}

#[test]
fn the_schedules_are_in_step_and_teach_no_lesson_twice() {
    let checkout = Checkout::holding(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
    for plan in &PLANS {
        let mut taught = plan.days.concat();
        let all = taught.len();
        taught.sort_unstable();
        taught.dedup();
        assert_eq!(taught.len(), all, "{}", plan.name);
    }
    assert_eq!(out_of_step(&checkout), None);
}
