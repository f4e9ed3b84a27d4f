//! What a teacher needs of the lessons: minutes per section, schedules, and how the exercises
//! stand.
//!
//! The minutes stand in each notebook, in a folded table at its end: `cargo course schedule` sums
//! them into the tables of `notebooks/TEACHING.md`, and `cargo course check` sees that these are in
//! step.

use crate::home::{Checkout, write_atomic};
use crate::notebook::{self, Cell, Exercise, Kind, Notebook, prose_lines};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// The tag of a teacher's note.
pub const TAG: &str = "teacher";

/// What the summary of a note begins with; behind it stands what kind of note it is.
const SUMMARY: &str = "<details><summary>For the teacher: ";

/// The kinds that every lesson has, and the table of minutes, which is its last cell.
pub const NOTES: [&str; 3] = ["ask", "demo", "watch out"];
pub const MINUTES: &str = "minutes";

/// A part of a lesson: what stands below a heading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// The heading, without its marks.
    pub heading: String,
    /// How long it takes in a workshop.
    pub minutes: u32,
}

impl Section {
    /// Whether it is an exercise.
    pub fn is_exercise(&self) -> bool {
        self.heading.starts_with("Exercise ")
    }
}

/// What kind of note a teacher's cell is.
pub fn note(cell: &Cell) -> Option<&str> {
    let (kind, _) = cell
        .source
        .strip_prefix(SUMMARY)?
        .split_once("</summary>\n\n")?;
    let folded = cell.source.trim_end().ends_with("\n\n</details>");
    (cell.kind == Kind::Markdown && folded).then_some(kind)
}

/// The minutes of `**Time:** 25 minutes`, anywhere in a line of the first cell.
pub fn time(notebook: &Notebook) -> Option<u32> {
    let first = notebook.cells.first()?;
    let lines = prose_lines(&first.source).filter_map(|(_, line)| line.split_once("**Time:**"));
    let mut words = lines.map(|(_, text)| text.trim().split_once(' '));
    let (number, unit) = words.next()??;
    unit.starts_with("minutes").then(|| number.parse().ok())?
}

/// The headings after the first cell to which minutes belong: `## …` and `### Exercise …`.
pub fn headings(notebook: &Notebook) -> Vec<String> {
    // The first cell says what the lesson is.
    let cells = notebook.cells.iter().skip(1);
    let cells = cells.filter(|cell| cell.kind == Kind::Markdown && !cell.has(TAG));
    let lines = cells.flat_map(|cell| prose_lines(&cell.source));
    let heading = |(_, line): (usize, &str)| {
        let section = line.strip_prefix("## ");
        let section = section.or_else(|| {
            let exercise = line.strip_prefix("### ")?;
            exercise.starts_with("Exercise ").then_some(exercise)
        });
        section.map(|text| text.trim().to_owned())
    };
    lines.filter_map(heading).collect()
}

/// A row of the table of minutes.
fn row(line: &str) -> Option<Section> {
    let (heading, minutes) = line.trim().trim_matches('|').rsplit_once('|')?;
    Some(Section {
        heading: heading.trim().to_owned(),
        minutes: minutes.trim().parse().ok()?,
    })
}

/// The sections with their minutes, from the folded table in the last cell.
///
/// # Errors
///
/// A notebook without that table; a row that is none; other sections than the notebook has; a sum
/// that is not the time which the lesson says.
pub fn sections(notebook: &Notebook) -> Result<Vec<Section>> {
    let last = notebook.cells.last();
    let table = last.filter(|cell| cell.has(TAG) && note(cell) == Some(MINUTES));
    let table = table.with_context(|| {
        format!(
            "the last cell must be the teacher's table of minutes: tagged `{TAG}`, and \
             `{SUMMARY}{MINUTES}</summary>`, a table of sections and minutes, `</details>`"
        )
    })?;
    let mut sections = Vec::new();
    let rows = table.source.lines().filter(|line| line.starts_with('|'));
    for line in rows.skip(2) {
        let section = row(line).with_context(|| format!("no section and its minutes: `{line}`"))?;
        sections.push(section);
    }
    let (own, said) = (headings(notebook), sections.iter().map(|s| &s.heading));
    if let Some(missing) = own
        .iter()
        .find(|heading| !said.clone().any(|s| s == *heading))
    {
        bail!("the table of minutes has no row for `{missing}`");
    }
    if let Some(other) = said.clone().zip(&own).find(|(said, own)| said != own) {
        bail!(
            "the table of minutes has `{}` where `{}` comes",
            other.0,
            other.1
        );
    }
    ensure!(
        sections.len() == own.len(),
        "the table of minutes has more rows than the lesson has sections"
    );
    let sum: u32 = sections.iter().map(|section| section.minutes).sum();
    ensure!(
        time(notebook).is_none_or(|time| time == sum),
        "the sections take {sum} minutes together: say so at the top, `**Time:** {sum} minutes`"
    );
    Ok(sections)
}

/// A lesson in a schedule.
#[derive(Debug)]
struct Lesson {
    number: String,
    title: String,
    file: String,
    sections: Vec<Section>,
}

impl Lesson {
    fn read(path: &Path) -> Result<Self> {
        let notebook = Notebook::read(path)?;
        let sections = sections(&notebook).with_context(|| notebook.name())?;
        let first = notebook.cells.first().map_or("", |cell| &cell.source);
        let title = first.lines().next().unwrap_or_default();
        let title = title.trim_start_matches("# ").split_once(" · ");
        Ok(Self {
            number: notebook.lesson(),
            title: title.map_or_else(String::new, |(_, title)| title.to_owned()),
            file: notebook.name(),
            sections,
        })
    }

    fn minutes(&self) -> u32 {
        self.sections.iter().map(|section| section.minutes).sum()
    }
}

/// A workshop: its name, and the lessons of each day.
struct Plan {
    name: &'static str,
    what: &'static str,
    days: &'static [&'static [&'static str]],
    /// When a day must be over, in minutes after midnight.
    end: u32,
}

const PLANS: [Plan; 3] = [
    Plan {
        name: "Half a day",
        what: "The layer, training it, and its way into a product",
        days: &[&["01", "04", "06"]],
        end: 12 * 60 + 30,
    },
    Plan {
        name: "One day",
        what: "The same, with why a low rank is enough, domains and reinforcement learning",
        days: &[&["01", "02", "04", "06", "09", "13"]],
        end: 17 * 60,
    },
    Plan {
        name: "Two days",
        what: "The method on the first day, its uses on the second",
        days: &[
            &["01", "02", "03", "04", "05", "06"],
            &["07", "09", "11", "12", "13", "15"],
        ],
        end: 17 * 60 + 30,
    },
];

/// A day begins at nine; lunch is an hour, not before noon; after 90 minutes there is a break.
const START: u32 = 9 * 60;
const NOON: u32 = 12 * 60;
const LUNCH: u32 = 60;
const BREAK: u32 = 15;
const WITHOUT_BREAK: u32 = 90;

/// `09:45`.
fn clock(minutes: u32) -> String {
    format!("{:02}:{:02}", minutes / 60, minutes % 60)
}

/// A day as rows of a table: from, until, what.
fn day(lessons: &[&Lesson], end: u32) -> Result<String> {
    let mut text = String::from("| from | until | |\n|---|---|---|\n");
    let (mut now, mut taught, mut eaten) = (START, 0, false);
    let mut row = |now: &mut u32, minutes: u32, what: &str| {
        let _ = writeln!(
            text,
            "| {} | {} | {what} |",
            clock(*now),
            clock(*now + minutes)
        );
        *now += minutes;
    };
    for (place, lesson) in lessons.iter().enumerate() {
        if place > 0 {
            if now >= NOON && !eaten {
                row(&mut now, LUNCH, "*lunch*");
                (eaten, taught) = (true, 0);
            } else if taught + lesson.minutes() / 2 >= WITHOUT_BREAK {
                row(&mut now, BREAK, "*break*");
                taught = 0;
            }
        }
        let what = format!("{} [{}]({})", lesson.number, lesson.title, lesson.file);
        row(&mut now, lesson.minutes(), &what);
        taught += lesson.minutes();
    }
    ensure!(
        now <= end,
        "the day ends at {}, and {} is the latest: give it fewer lessons",
        clock(now),
        clock(end)
    );
    Ok(text)
}

/// The schedules and the minutes of every lesson's sections, as Markdown.
fn schedules(lessons: &[Lesson]) -> Result<String> {
    let mut text = String::new();
    for plan in &PLANS {
        let _ = writeln!(text, "### {}\n\n{}.\n", plan.name, plan.what);
        for (number, numbers) in plan.days.iter().enumerate() {
            let chosen = numbers.iter().map(|number| {
                let found = lessons.iter().find(|lesson| lesson.number == **number);
                found.with_context(|| format!("there is no lesson {number}"))
            });
            let chosen = chosen.collect::<Result<Vec<_>>>()?;
            if plan.days.len() > 1 {
                let _ = writeln!(text, "Day {}:\n", number + 1);
            }
            text += &day(&chosen, plan.end).with_context(|| plan.name)?;
            text.push('\n');
        }
        let taught = plan.days.concat();
        let rest = lessons.iter().map(|lesson| lesson.number.as_str());
        let rest: Vec<_> = rest.filter(|number| !taught.contains(number)).collect();
        let _ = writeln!(text, "To read alone: {}.\n", rest.join(", "));
    }
    let all: u32 = lessons.iter().map(Lesson::minutes).sum();
    let _ = writeln!(
        text,
        "### Minutes of every section\n\n{} lessons, {} hours {} minutes.\n",
        lessons.len(),
        all / 60,
        all % 60
    );
    for lesson in lessons {
        let parts = lesson.sections.iter();
        let parts = parts.map(|part| format!("{} {}", part.heading, part.minutes));
        let _ = writeln!(
            text,
            "- **{} {}**, {} minutes: {}.",
            lesson.number,
            lesson.title,
            lesson.minutes(),
            parts.collect::<Vec<_>>().join("; ")
        );
    }
    Ok(text)
}

const BEGIN: &str = "<!-- Written by `cargo course schedule --write`: do not edit by hand. -->\n";
const END: &str = "<!-- End of what is written. -->\n";

fn page(checkout: &Checkout) -> PathBuf {
    checkout.join("notebooks/TEACHING.md")
}

/// The page with new schedules in the place of the old ones.
fn renewed(page: &str, schedules: &str) -> Result<String> {
    let (before, rest) = page.split_once(BEGIN).with_context(|| {
        format!(
            "put the line `{}` back, behind which they stand",
            BEGIN.trim()
        )
    })?;
    let (_, after) = rest.split_once(END).with_context(|| {
        format!(
            "put the line `{}` back, before which they stand",
            END.trim()
        )
    })?;
    Ok(format!("{before}{BEGIN}\n{schedules}\n{END}{after}"))
}

/// What `notebooks/TEACHING.md` holds, and what it should.
fn both(checkout: &Checkout) -> Result<(String, String)> {
    let file = page(checkout);
    let lessons = notebook::select(checkout, &[])?;
    let lessons = lessons.iter().map(|path| Lesson::read(path));
    let schedules = schedules(&lessons.collect::<Result<Vec<_>>>()?)?;
    let named = || file.display().to_string();
    let old = fs::read_to_string(&file).with_context(named)?;
    let new = renewed(&old, &schedules).with_context(named)?;
    Ok((old, new))
}

/// Why the schedules are not those of the notebooks, if they are not.
pub fn out_of_step(checkout: &Checkout) -> Option<String> {
    match both(checkout) {
        Ok((old, new)) if old == new => None,
        Ok(_) => Some(
            "notebooks/TEACHING.md is older than the minutes in the notebooks: run \
             `cargo course schedule --write`"
                .to_owned(),
        ),
        Err(error) => Some(format!("the schedules cannot be made: {error:#}")),
    }
}

/// What `cargo course schedule` can be told.
#[derive(Args)]
pub struct Options {
    /// Write them into notebooks/TEACHING.md
    #[arg(long)]
    write: bool,
}

/// `cargo course schedule`: prints the schedules, or writes them.
pub fn schedule(checkout: &Checkout, options: &Options) -> Result<bool> {
    let (old, new) = both(checkout)?;
    if options.write {
        if old != new {
            write_atomic(&page(checkout), &new)?;
        }
        println!("notebooks/TEACHING.md is in step with the notebooks.");
    } else {
        let (_, rest) = new.split_once(BEGIN).unwrap_or_default();
        let (text, _) = rest.split_once(END).unwrap_or_default();
        println!("{}", text.trim());
    }
    Ok(true)
}

/// How far a learner is with an exercise, by what the notebook on the disk shows.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Solved,
    /// So many of so many cases are right.
    NotYet(u32, u32),
    NotRun,
}

impl State {
    fn of(exercise: &Exercise<'_>) -> Self {
        let printed = &exercise.check.printed;
        let right = |text: &str| -> Option<(u32, u32)> {
            let (_, counts) = text.split_once("○ Not yet: ")?.1.split_once('(')?;
            let (right, all) = counts.split_once(" right)")?.0.split_once(" of ")?;
            Some((right.parse().ok()?, all.parse().ok()?))
        };
        if printed.contains("✓ Exercise ") {
            Self::Solved
        } else {
            right(printed).map_or(Self::NotRun, |(right, all)| Self::NotYet(right, all))
        }
    }
}

/// The minutes of a heading, by the table of a notebook that may have grown since.
fn minutes_of(notebook: &Notebook, heading: &str) -> Option<u32> {
    let mut cells = notebook.cells.iter().rev();
    let table = cells.find(|cell| note(cell) == Some(MINUTES))?;
    let mut rows = table.source.lines().filter_map(row);
    rows.find(|section| section.heading == heading)
        .map(|section| section.minutes)
}

/// The heading of an exercise: the last one before its starter.
fn heading_of(notebook: &Notebook, exercise: &Exercise<'_>) -> Option<String> {
    let before = notebook.cells.iter().take(exercise.starter.number - 1);
    let lines = before.filter(|cell| cell.kind == Kind::Markdown);
    let lines = lines.flat_map(|cell| prose_lines(&cell.source));
    let headings = lines.filter_map(|(_, line)| line.strip_prefix("### "));
    let mut exercises = headings.filter(|heading| heading.starts_with("Exercise "));
    exercises.by_ref().last().map(str::to_owned)
}

/// `cargo course exercises`: every exercise with its minutes and how it stands. A notebook that
/// cannot be read is named, and the others are shown.
pub fn exercises(checkout: &Checkout, lessons: &[String]) -> Result<bool> {
    println!("{:<40} {:>7}  state", "exercise", "minutes");
    let (mut count, mut solved, mut sum, mut well) = (0, 0, 0, true);
    for path in notebook::select(checkout, lessons)? {
        let read = || -> Result<Vec<(String, Option<u32>, State)>> {
            let notebook = Notebook::read(&path)?;
            let exercises = notebook.exercises()?;
            let rows = exercises.iter().map(|exercise| {
                let heading = heading_of(&notebook, exercise).unwrap_or_default();
                let minutes = minutes_of(&notebook, &heading);
                (heading, minutes, State::of(exercise))
            });
            Ok(rows.collect())
        };
        println!("{}", path.file_name().unwrap_or_default().to_string_lossy());
        let rows = match read() {
            Ok(rows) => rows,
            Err(error) => {
                eprintln!("error: {error:#}");
                well = false;
                continue;
            }
        };
        for (heading, minutes, state) in rows {
            let said = match state {
                State::Solved => "solved".to_owned(),
                State::NotYet(right, all) => format!("{right} of {all} right"),
                State::NotRun => "not run".to_owned(),
            };
            count += 1;
            solved += u32::from(state == State::Solved);
            sum += minutes.unwrap_or(0);
            let heading = heading.trim_start_matches("Exercise ");
            let minutes = minutes.map_or("–".to_owned(), |minutes| minutes.to_string());
            println!("  {heading:<38} {minutes:>7}  {said}");
        }
    }
    println!("{count} exercises, {sum} minutes, {solved} solved");
    Ok(well)
}

#[cfg(test)]
mod tests;
