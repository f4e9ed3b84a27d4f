//! What can be measured of a figure's looks: nothing is cut off, tiny, or on top of another.

use super::*;
use crate::chart::font::Fonts;
use crate::chart::scene::Rect;

/// The box around each text of a figure, measured with the bundled font.
fn boxes(figure: &Figure) -> Vec<(String, f64, Rect)> {
    let fonts = Fonts::load().unwrap();
    let document = roxmltree::Document::parse(figure.svg()).unwrap();
    let texts = document.descendants().filter(|n| n.has_tag_name("text"));
    texts
        .map(|node| {
            let number = |name| node.attribute(name).unwrap().parse::<f64>().unwrap();
            let (x, y, size) = (number("x"), number("y"), number("font-size"));
            let text = node.text().unwrap().to_string();
            let width = fonts.width(&text, size, node.has_attribute("font-weight"));
            let start = match node.attribute("text-anchor") {
                None => 0.0,
                Some("middle") => -width / 2.0,
                Some(_) => -width,
            };
            // From below the baseline to the top of a capital letter.
            let (down, up) = (0.2 * size, 0.73 * size);
            let at = if node.has_attribute("transform") {
                Rect::new(x - up, y - start - width, x + down, y - start)
            } else {
                Rect::new(x + start, y - up, x + start + width, y + down)
            };
            (text, size, at)
        })
        .collect()
}

#[test]
fn no_text_is_cut_off_or_tiny() {
    for figure in figures() {
        let (width, height) = figure.size();
        let page = Rect::new(2.0, 2.0, f64::from(width) - 2.0, f64::from(height) - 2.0);
        for (text, size, at) in boxes(&figure) {
            assert!(size >= 13.0, "{figure:?}: \"{text}\" has {size} px");
            let inside = page.holds((at.left, at.top)) && page.holds((at.right, at.bottom));
            assert!(inside, "{figure:?}: \"{text}\" at {at:?}");
        }
    }
}

#[test]
fn no_text_covers_another() {
    for figure in figures() {
        let boxes = boxes(&figure);
        assert!(boxes.len() > 3);
        for (i, (a, _, at)) in boxes.iter().enumerate() {
            for (b, _, other) in &boxes[i + 1..] {
                let across = at.right.min(other.right) - at.left.max(other.left);
                let down = at.bottom.min(other.bottom) - at.top.max(other.top);
                let apart = across <= 0.5 || down <= 0.5;
                assert!(apart, "{figure:?}: \"{a}\" and \"{b}\" overlap");
            }
        }
    }
}

#[test]
fn nothing_reaches_the_edge_of_the_page() {
    for figure in figures() {
        let (width, height, rgb) = output::decode(figure.png());
        for (index, pixel) in rgb.chunks_exact(3).enumerate() {
            let (x, y) = (index % width, index / width);
            if x == 0 || y == 0 || x == width - 1 || y == height - 1 {
                assert_eq!(pixel, [255, 255, 255], "{figure:?} at {x}, {y}");
            }
        }
    }
}

/// The PNG's letters stand where the SVG has its texts: the two are drawn by different code.
#[test]
fn texts_are_at_the_same_place_in_png_and_svg() {
    for figure in [lines().draw().unwrap(), heat().draw().unwrap()] {
        let (width, _, rgb) = output::decode(figure.png());
        let dark = |x: usize, y: usize| rgb[(y * width + x) * 3] < 110;
        for (text, _, at) in boxes(&figure) {
            // Only texts on white ground: those outside the plot.
            let (x0, x1) = (at.left.floor() as usize, at.right.ceil() as usize);
            let (y0, y1) = (at.top.floor() as usize, at.bottom.ceil() as usize);
            let outside = |x: usize, y: usize| x < x0 || x >= x1 || y < y0 || y >= y1;
            let rim = (x0 - 2..x1 + 2).flat_map(|x| (y0 - 2..y1 + 2).map(move |y| (x, y)));
            let around = rim.clone().filter(|p| outside(p.0, p.1));
            let white = |p: (usize, usize)| rgb[(p.1 * width + p.0) * 3] > 235;
            if !around.clone().all(white) {
                assert!(
                    at.top > 40.0 || at.left > 60.0,
                    "\"{text}\" spills over {at:?}"
                );
                continue;
            }
            let inked = rim.filter(|p| !outside(p.0, p.1) && dark(p.0, p.1)).count();
            assert!(inked > 3, "{figure:?}: no ink where \"{text}\" should be");
        }
    }
}

#[test]
fn long_names_can_be_told_apart() {
    let figure = long_names().draw().unwrap();
    for name in ["0.mlp.q_", "0.mlp.up_", "1.mlp.down_"] {
        let shown = boxes(&figure).iter().any(|(text, ..)| text.contains(name));
        assert!(shown, "{name} is not to be seen");
    }
}

#[test]
fn numbers_in_cells_appear_only_where_there_is_room() {
    let roomy = heat().draw().unwrap();
    assert!(boxes(&roomy).len() > 36);
    for (rows, columns) in [(60, 4), (4, 60)] {
        let names = |count: i32| (0..count).map(|i| i.to_string()).collect::<Vec<_>>();
        let row = |i: i32| (0..columns).map(move |j| f64::from(i * j) / 7.0);
        let map = HeatMap::new("t", "x", "y")
            .columns(names(columns))
            .rows(names(rows));
        let tight = map.values((0..rows).map(row)).draw().unwrap();
        assert!(boxes(&tight).len() < 100, "{rows} × {columns}");
    }
}

#[test]
fn a_reference_shows_on_top_of_bars() {
    let plain = BarChart::new("t", "x", "y").bar("a", 1);
    let with = plain.clone().reference("half", 0.5).draw().unwrap();
    let (width, height, rgb) = output::decode(with.png());
    let column = |y: usize| &rgb[(y * width + width / 2) * 3..][..3];
    let whitish = (150..height - 100).filter(|&y| column(y).iter().all(|c| *c > 200));
    assert!(
        whitish.count() >= 1,
        "no white ground below the reference line"
    );
}

#[test]
fn references_go_across_and_upright() {
    let chart = LineChart::new("t", "x", "y").line("a", [(0, 0), (10, 10)]);
    let plain = chart.clone().draw().unwrap();
    let (width, height, before) = output::decode(plain.png());
    let across = chart.clone().reference("r", 5).draw().unwrap();
    let upright = chart.clone().reference_x("r", 5).draw().unwrap();
    let beyond = chart.reference_x("r", 20).draw().unwrap();
    let dark =
        |rgb: &[u8], x: usize, y: usize| rgb[(y * width + x) * 3..][..3].iter().all(|c| *c < 130);
    // The most dark pixels in one column, or in one row, right of the axis and above it.
    let longest = |rgb: &[u8], down: bool| {
        let (lines, length) = if down {
            (width, height)
        } else {
            (height, width)
        };
        (100..lines - if down { 30 } else { 60 })
            .map(|line| {
                let at = |along: usize| if down { (line, along) } else { (along, line) };
                (100..length - 70)
                    .filter(|&along| dark(rgb, at(along).0, at(along).1))
                    .count()
            })
            .max()
            .unwrap()
    };
    let (_, _, across) = output::decode(across.png());
    let (_, _, upright) = output::decode(upright.png());
    assert!(longest(&before, true) < 60 && longest(&before, false) < 60);
    assert!(longest(&across, false) > 250 && longest(&across, true) < 60);
    assert!(longest(&upright, true) > 100 && longest(&upright, false) < 60);
    let (_, _, beyond) = output::decode(beyond.png());
    assert!(
        longest(&beyond, true) > 100,
        "the x axis reaches its reference"
    );
}

#[test]
fn cells_equally_far_from_the_center_are_equally_dark() {
    let map = |values: [[f64; 3]; 1]| {
        HeatMap::new("t", "x", "y")
            .columns(["a", "b", "c"])
            .rows(["r"])
            .values(values)
    };
    // The colours of three places in the three cells, clear of their numbers.
    let cells = |map: HeatMap| {
        let figure = map.draw().unwrap();
        let (width, height, rgb) = output::decode(figure.png());
        let row = height / 2 - 60;
        let colour = |x: usize| {
            let at = (row * width + x) * 3;
            (rgb[at], rgb[at + 1], rgb[at + 2])
        };
        [120, 300, 520].map(colour)
    };
    let by = |map: HeatMap| map.diverging(4, "worse", "better");
    let lowest = colour::diverging(-0.5);
    let shown = cells(by(map([[3.0, 4.0, 6.0]])));
    assert_eq!(
        shown,
        [lowest, colour::diverging(0.0), colour::diverging(1.0)]
    );
    let shown = cells(by(map([[3.0, 4.0, 6.0]])).range(3, 6));
    assert_eq!(
        shown[0], lowest,
        "the ends of the range do not stretch one side"
    );
}

#[test]
fn the_center_is_named_beside_the_colour_bar() {
    let said = |map: HeatMap| {
        let figure = map.draw().unwrap();
        let texts: Vec<String> = boxes(&figure).into_iter().map(|(text, ..)| text).collect();
        texts.into_iter().find(|text| text.contains('←'))
    };
    assert_eq!(
        said(changes()).unwrap(),
        "better ← 0 → worse",
        "from bottom to top"
    );
    assert_eq!(said(heat()), None);
    let long = "a very long way of saying that it is not as good as it was before";
    let cut = said(changes().diverging(0, long, "worse")).unwrap();
    assert!(cut.contains('…') && cut.ends_with(" ← 0 → worse"), "{cut}");
}

#[test]
fn ranges_in_cells_appear_only_where_there_is_room() {
    let has = |figure: &Figure, part: &str| boxes(figure).iter().any(|(t, ..)| t.contains(part));
    let roomy = transfer().draw().unwrap();
    assert!(has(&roomy, "3.98") && has(&roomy, "3.94 to 4.02"));
    let tight = transfer().size(430, 300).draw().unwrap();
    assert!(has(&tight, "3.98") && !has(&tight, "3.94 to 4.02"));
    assert!(tight.describe().contains("3.98 (3.94 to 4.02)"));
}
