//! The three outputs: well-formed, of the right size, and always the same.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::*;
use crate::error::Error;

/// Width, height and bytes of a PNG.
pub(super) fn decode(bytes: &[u8]) -> (usize, usize, Vec<u8>) {
    let decoder = png::Decoder::new(std::io::Cursor::new(bytes));
    let mut reader = decoder.read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut rgb).unwrap();
    assert_eq!(info.color_type, png::ColorType::Rgb);
    (info.width as usize, info.height as usize, rgb)
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    for (a, b) in figures().iter().zip(figures()) {
        assert!(a.png() == b.png(), "{a:?}: the PNG differs");
        assert_eq!(a.svg(), b.svg());
        assert_eq!(a.describe(), b.describe());
    }
}

#[test]
fn the_png_has_the_size_asked_for_and_a_picture_in_it() {
    for figure in figures() {
        let (width, height, rgb) = decode(figure.png());
        assert_eq!((width as u32, height as u32), figure.size());
        let colours: std::collections::HashSet<&[u8]> = rgb.chunks_exact(3).collect();
        assert!(colours.len() > 20, "{figure:?} is almost empty");
    }
    assert_eq!(lines().draw().unwrap().size(), (800, 460));
}

#[test]
fn the_svg_is_well_formed_and_says_what_it_shows() {
    for figure in figures() {
        let document = roxmltree::Document::parse(figure.svg()).unwrap();
        let root = document.root_element();
        let (width, height) = figure.size();
        let attribute = |name| root.attribute(name).unwrap();
        assert_eq!(attribute("role"), "img");
        assert_eq!(attribute("width"), width.to_string());
        assert_eq!(attribute("height"), height.to_string());
        assert_eq!(attribute("viewBox"), format!("0 0 {width} {height}"));
        assert_eq!(attribute("font-family"), "DejaVu Sans, Verdana, sans-serif");
        let children: Vec<_> = root.children().filter(|n| n.is_element()).collect();
        assert!(children[0].has_tag_name("title") && children[1].has_tag_name("desc"));
        assert_eq!(children[1].text().unwrap(), figure.describe());
        let id = |n: usize| children[n].attribute("id").unwrap();
        assert_eq!(attribute("aria-labelledby"), format!("{} {}", id(0), id(1)));
        assert!(!id(0).is_empty() && id(0) != id(1));
        assert_eq!(
            children[2].attribute("fill"),
            Some("#FFFFFF"),
            "a white ground"
        );
    }
}

#[test]
fn two_figures_on_a_page_have_different_ids() {
    let id = |svg: &str| svg.split("title id=\"").nth(1).unwrap()[..22].to_string();
    let (a, b) = (lines().draw().unwrap(), bars().draw().unwrap());
    assert_ne!(id(a.svg()), id(b.svg()));
}

#[test]
fn any_text_survives_in_the_svg() {
    let nasty = "<b> & \"quotes\" 'too'\u{0}\u{1b}\u{fffe}\n]]> <!-- 漢字 🦀";
    let chart = LineChart::new(nasty, nasty, nasty).line(nasty, [(0, 1), (1, 2)]);
    let figure = chart
        .reference(format!("{nasty}2"), 1)
        .words(nasty)
        .draw()
        .unwrap();
    let document = roxmltree::Document::parse(figure.svg()).unwrap();
    let title = document.descendants().find(|n| n.has_tag_name("title"));
    assert!(
        title
            .unwrap()
            .text()
            .unwrap()
            .starts_with("<b> & \"quotes\" 'too'")
    );
    let bars = BarChart::new("t", "x", "y").bar(nasty, 1).bar("a", 2);
    let map = HeatMap::new("t", "x", "y")
        .columns([nasty, "b"])
        .rows([nasty]);
    let grid = ImageGrid::new("t").gray(nasty, 1, 1, [0.5]);
    let runs = RewardChart::new("t", "x", "y").runs(nasty, [[1, 2]]);
    for figure in [
        bars.draw(),
        map.values([[1, 2]]).draw(),
        grid.draw(),
        runs.draw(),
    ] {
        roxmltree::Document::parse(figure.unwrap().svg()).unwrap();
    }
}

#[test]
fn evcxr_gets_three_blocks() {
    let figure = lines().draw().unwrap();
    let blocks = figure.blocks();
    let mut found = Vec::new();
    let mut rest = blocks.lines();
    while let Some(line) = rest.next() {
        let kind = line.strip_prefix("EVCXR_BEGIN_CONTENT ").unwrap();
        let content: Vec<&str> = rest
            .by_ref()
            .take_while(|l| *l != "EVCXR_END_CONTENT")
            .collect();
        found.push((kind, content.join("\n")));
    }
    assert!(blocks.ends_with("EVCXR_END_CONTENT\n"));
    assert_eq!(found.len(), 3);
    assert_eq!(found[0].0, "image/png");
    assert_eq!(STANDARD.decode(&found[0].1).unwrap(), figure.png());
    assert_eq!(
        found[1],
        ("image/svg+xml", figure.svg().trim_end().to_string())
    );
    assert_eq!(found[2], ("text/plain", figure.describe().to_string()));
}

#[test]
fn saving_leaves_the_file_and_nothing_else() {
    let folder = std::env::temp_dir().join(format!("course-chart-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let figure = lines().draw().unwrap();
    figure.save(folder.join("a.png")).unwrap();
    figure.save(folder.join("b.SVG")).unwrap();
    figure.save(folder.join("b.SVG")).unwrap();
    assert_eq!(std::fs::read(folder.join("a.png")).unwrap(), figure.png());
    assert_eq!(
        std::fs::read(folder.join("b.SVG")).unwrap(),
        figure.svg().as_bytes()
    );
    for wrong in ["c.jpg", "c", ".png"] {
        let error = figure.save(folder.join(wrong)).unwrap_err();
        assert!(error.to_string().contains(".png or .svg"), "{error}");
    }
    let missing = figure
        .save(folder.join("no/such/folder/d.png"))
        .unwrap_err();
    assert!(matches!(missing, Error::File { .. }), "{missing:?}");
    // A folder in the way: the move fails, and nothing half-written remains.
    std::fs::create_dir_all(folder.join("e.png/inside")).unwrap();
    assert!(figure.save(folder.join("e.png")).is_err());
    let mut names: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["a.png", "b.SVG", "e.png"]);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn debug_is_short() {
    let text = format!("{:?}", lines().draw().unwrap());
    assert_eq!(text, "Figure(\"Parameters against rank\", 800 × 460)");
}

#[test]
fn an_image_is_enlarged_without_blur() {
    let grid = ImageGrid::new("t")
        .gray("a", 2, 1, [0.0, 1.0])
        .rgb("b", 1, 1, [1.0, 0.0, 0.2]);
    let figure = grid.draw().unwrap();
    let (_, _, rgb) = decode(figure.png());
    let count = |colour: [u8; 3]| rgb.chunks_exact(3).filter(|p| *p == colour).count();
    let side = (count([255, 0, 51]) as f64).sqrt();
    assert!(
        side > 50.0 && side.fract() == 0.0,
        "the red pixel became a square"
    );
    assert!(
        count([0, 0, 0]) as f64 >= side * side,
        "the black one as well"
    );
    let document = roxmltree::Document::parse(figure.svg()).unwrap();
    let images = document.descendants().filter(|n| n.has_tag_name("image"));
    for image in images {
        let link = image.attribute("href").unwrap();
        let bytes = STANDARD.decode(link.strip_prefix("data:image/png;base64,").unwrap());
        let (width, height, _) = decode(&bytes.unwrap());
        assert_eq!(image.attribute("width"), Some(width.to_string().as_str()));
        assert_eq!(image.attribute("height"), Some(height.to_string().as_str()));
    }
}

#[test]
fn the_pixels_of_an_image_keep_their_places() {
    let figure = ImageGrid::new("t")
        .gray("a", 3, 2, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
        .draw()
        .unwrap();
    let link = figure.svg().split("base64,").nth(1).unwrap();
    let bytes = STANDARD.decode(link.split('"').next().unwrap()).unwrap();
    let (width, height, rgb) = decode(&bytes);
    let middle = |x: usize, y: usize| {
        let (x, y) = ((2 * x + 1) * width / 6, (2 * y + 1) * height / 4);
        rgb[(y * width + x) * 3]
    };
    let seen: Vec<u8> = (0..6).map(|i| middle(i % 3, i / 3)).collect();
    assert_eq!(seen, [0, 51, 102, 153, 204, 255]);
}

#[test]
fn a_program_keeps_a_figure_under_its_title() {
    let folder = tempfile::tempdir().unwrap();
    let chart = crate::chart::BarChart::new("W · x, r = 0.5", "x", "y");
    let figure = chart.bar("a", 1).draw().unwrap();
    let inside = folder.path().join("a new/one");
    figure.keep(&inside);
    let written = std::fs::read(inside.join("W___x__r___0_5.png")).unwrap();
    assert_eq!(written, figure.png());
}
