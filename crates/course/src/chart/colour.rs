//! Colours: the series palette, the colour map of heat maps, and contrast.

/// Red, green and blue, 0 to 255 each.
pub(super) type Rgb = (u8, u8, u8);

pub(super) const WHITE: Rgb = (255, 255, 255);
/// Text.
pub(super) const INK: Rgb = (34, 34, 34);
/// Axis lines and ticks.
pub(super) const AXIS: Rgb = (70, 70, 70);
/// Reference lines.
pub(super) const REFERENCE: Rgb = (85, 85, 85);
/// Grid lines at labelled ticks, and the lighter ones between them.
pub(super) const GRID: Rgb = (222, 222, 222);
pub(super) const GRID_MINOR: Rgb = (239, 239, 239);

/// Okabe–Ito without its yellow; its orange and sky blue are darkened until they reach
/// a contrast of 3 : 1 on white.
pub(super) const PALETTE: [Rgb; 7] = [
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (194, 134, 0),
    (64, 152, 204),
    (0, 0, 0),
];

/// Viridis at 17 equal steps; what lies between is interpolated.
const VIRIDIS: [Rgb; 17] = [
    (0x44, 0x01, 0x54),
    (0x48, 0x18, 0x6a),
    (0x47, 0x2d, 0x7b),
    (0x42, 0x40, 0x86),
    (0x3b, 0x52, 0x8b),
    (0x33, 0x63, 0x8d),
    (0x2c, 0x72, 0x8e),
    (0x26, 0x82, 0x8e),
    (0x21, 0x91, 0x8c),
    (0x1f, 0xa0, 0x88),
    (0x28, 0xae, 0x80),
    (0x3f, 0xbc, 0x73),
    (0x5e, 0xc9, 0x62),
    (0x84, 0xd4, 0x4b),
    (0xad, 0xdc, 0x30),
    (0xd8, 0xe2, 0x19),
    (0xfd, 0xe7, 0x25),
];

/// From near white to dark blue and to dark orange, equally light at each step: hues that no
/// common colour blindness mixes up.
const BELOW: [Rgb; 6] = [
    (247, 247, 247),
    (186, 212, 232),
    (122, 174, 213),
    (59, 131, 189),
    (12, 87, 152),
    (5, 48, 100),
];
const ABOVE: [Rgb; 6] = [
    (247, 247, 247),
    (245, 201, 166),
    (228, 151, 96),
    (197, 100, 33),
    (147, 64, 4),
    (90, 37, 0),
];

/// The colour of series number `index`.
pub(super) fn series(index: usize) -> Rgb {
    PALETTE[index % PALETTE.len()]
}

/// The viridis colour at `share`, 0 (dark) to 1 (light).
pub(super) fn viridis(share: f64) -> Rgb {
    along(&VIRIDIS, share)
}

/// The diverging colour at `side`: −1 dark blue, 0 near white, 1 dark orange.
pub(super) fn diverging(side: f64) -> Rgb {
    along(if side < 0.0 { &BELOW } else { &ABOVE }, side.abs())
}

/// The colour at `share` of a map's equal steps.
fn along(map: &[Rgb], share: f64) -> Rgb {
    let place = share.clamp(0.0, 1.0) * (map.len() - 1) as f64;
    let low = (place as usize).min(map.len() - 2);
    blend(map[low], map[low + 1], place - low as f64)
}

/// `share` of `b` over `a`.
pub(super) fn blend(a: Rgb, b: Rgb, share: f64) -> Rgb {
    let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * share).round() as u8;
    (mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

/// Contrast of two colours as the WCAG defines it, 1 to 21.
pub(super) fn contrast(a: Rgb, b: Rgb) -> f64 {
    let (a, b) = (luminance(a), luminance(b));
    (a.max(b) + 0.05) / (a.min(b) + 0.05)
}

/// Black or white, whichever reads better on `ground`.
pub(super) fn text_on(ground: Rgb) -> Rgb {
    if contrast(WHITE, ground) >= contrast((0, 0, 0), ground) {
        WHITE
    } else {
        (0, 0, 0)
    }
}

fn luminance((r, g, b): Rgb) -> f64 {
    let linear = |c: u8| {
        let c = f64::from(c) / 255.0;
        if c <= 0.04045 {
            c / 12.92
        } else {
            ((c + 0.055) / 1.055).powf(2.4)
        }
    };
    0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_colour_is_legible_on_white() {
        for colour in PALETTE {
            let c = contrast(colour, WHITE);
            assert!(c >= 3.0, "{colour:?} has contrast {c:.2}");
        }
        assert!(contrast(REFERENCE, WHITE) >= 4.5 && contrast(INK, WHITE) >= 7.0);
    }

    #[test]
    fn the_colour_map_grows_evenly_lighter() {
        let steps: Vec<f64> = (0..=64).map(|i| f64::from(i) / 64.0).collect();
        for pair in steps.windows(2) {
            assert!(luminance(viridis(pair[0])) < luminance(viridis(pair[1])));
        }
        assert_eq!((viridis(-1.0), viridis(2.0)), (VIRIDIS[0], VIRIDIS[16]));
    }

    #[test]
    fn text_in_a_cell_is_always_readable() {
        for i in 0..=100 {
            let share = f64::from(i) / 100.0;
            for ground in [viridis(share), diverging(share), diverging(-share)] {
                assert!(contrast(text_on(ground), ground) >= 4.5);
            }
        }
    }

    /// CIELAB of a colour as seen without one kind of cone, by the matrices of Machado,
    /// Oliveira and Fernandes (2009) at full severity; with the unit matrix, as most see it.
    fn seen(colour: Rgb, cones: [[f64; 3]; 3]) -> [f64; 3] {
        let linear = |c: u8| luminance((c, c, c));
        let rgb = [linear(colour.0), linear(colour.1), linear(colour.2)];
        let times = |row: [f64; 3], v: [f64; 3]| -> f64 { (0..3).map(|i| row[i] * v[i]).sum() };
        let rgb = cones.map(|row| times(row, rgb).clamp(0.0, 1.0));
        let f = |t: f64| {
            if t > 0.008856 {
                t.cbrt()
            } else {
                7.787 * t + 16.0 / 116.0
            }
        };
        let x = f(times([0.4124564, 0.3575761, 0.1804375], rgb) / 0.95047);
        let y = f(times([0.2126729, 0.7151522, 0.0721750], rgb));
        let z = f(times([0.0193339, 0.1191920, 0.9503041], rgb) / 1.08883);
        [116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)]
    }

    const ALL: [[f64; 3]; 3] = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];
    const BLINDNESSES: [[[f64; 3]; 3]; 3] = [
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
    ];

    #[test]
    fn both_sides_of_the_centre_darken_alike() {
        let light = |side: f64| seen(diverging(side), ALL)[0];
        for i in 0..50 {
            let (near, far) = (f64::from(i) / 50.0, f64::from(i + 1) / 50.0);
            for sign in [-1.0, 1.0] {
                assert!(light(sign * far) < light(sign * near), "{far}");
            }
            assert!((light(far) - light(-far)).abs() < 3.0, "{far}");
        }
        assert_eq!(diverging(0.0), diverging(-0.0));
        assert_eq!((diverging(-9.0), diverging(9.0)), (BELOW[5], ABOVE[5]));
    }

    #[test]
    fn the_colour_blind_can_tell_the_sides_apart() {
        for cones in [[ALL; 1].as_slice(), &BLINDNESSES].concat() {
            for i in 10..=50 {
                let side = f64::from(i) / 50.0;
                let (a, b) = (seen(diverging(side), cones), seen(diverging(-side), cones));
                let apart = (0..3).map(|i| (a[i] - b[i]).powi(2)).sum::<f64>().sqrt();
                assert!(apart > 30.0, "{side}: {apart:.1} apart");
            }
        }
    }
}
