//! A scene as a PNG: plotters paints it too large, averaging makes the edges smooth, and the
//! letters are drawn at their final size from their outlines.
//!
//! (Plotters' own text goes to whole pixels and leaves out the space before each letter,
//! which makes words uneven at 13 px; its sizes are also not those of its SVG.)

use ab_glyph::{Font, point};
use plotters::prelude::{BitMapBackend, IntoDrawingArea};

use super::colour::Rgb;
use super::font::Fonts;
use super::paint::Painter;
use super::scene::{Anchor, Picture, Scene, Text};

/// The scene as PNG bytes, or what went wrong in words.
pub(super) fn png(scene: &Scene, fonts: &Fonts) -> Result<Vec<u8>, String> {
    let mut canvas = shapes(scene)?;
    for picture in &scene.pictures {
        canvas.picture(picture);
    }
    for text in &scene.texts {
        canvas.text(fonts, text);
    }
    encode(scene.width, scene.height, &canvas.rgb)
}

/// Three bytes a pixel as a PNG file.
pub(super) fn encode(width: u32, height: u32, rgb: &[u8]) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(|e| e.to_string())?;
    writer.write_image_data(rgb).map_err(|e| e.to_string())?;
    writer.finish().map_err(|e| e.to_string())?;
    Ok(bytes)
}

fn shapes(scene: &Scene) -> Result<Canvas, String> {
    let (width, height) = (scene.width as usize, scene.height as usize);
    // Large figures get by with less, which also bounds the memory.
    let zoom = if width * height <= 2_000_000 { 4 } else { 2 };
    let mut large = vec![255; width * zoom * height * zoom * 3];
    {
        let size = (scene.width * zoom as u32, scene.height * zoom as u32);
        let area = BitMapBackend::with_buffer(&mut large, size).into_drawing_area();
        let painter = Painter {
            zoom: zoom as f64,
            vector: false,
        };
        painter.paint(&area, scene).map_err(|e| e.to_string())?;
        area.present().map_err(|e| e.to_string())?;
    }
    let mut rgb = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        shrink_row(&large, width, y, zoom, &mut rgb);
    }
    Ok(Canvas { width, height, rgb })
}

/// Appends row `y`, each pixel the mean of `zoom` × `zoom` large ones.
fn shrink_row(large: &[u8], width: usize, y: usize, zoom: usize, rgb: &mut Vec<u8>) {
    let mut sums = vec![0_u32; width * 3];
    let row_bytes = width * zoom * 3;
    for row in large[y * zoom * row_bytes..]
        .chunks_exact(row_bytes)
        .take(zoom)
    {
        for (block, sum) in row.chunks_exact(zoom * 3).zip(sums.chunks_exact_mut(3)) {
            for pixel in block.chunks_exact(3) {
                for (sum, byte) in sum.iter_mut().zip(pixel) {
                    *sum += u32::from(*byte);
                }
            }
        }
    }
    let count = (zoom * zoom) as u32;
    rgb.extend(sums.iter().map(|s| ((s + count / 2) / count) as u8));
}

struct Canvas {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

impl Canvas {
    fn picture(&mut self, picture: &Picture) {
        let row_bytes = picture.width as usize * 3;
        for (row, bytes) in picture.rgb.chunks_exact(row_bytes).enumerate() {
            let y = picture.top as usize + row;
            let start = (y * self.width + picture.left as usize) * 3;
            if let Some(target) = self.rgb.get_mut(start..start + row_bytes) {
                target.copy_from_slice(bytes);
            }
        }
    }

    fn text(&mut self, fonts: &Fonts, text: &Text) {
        let (glyphs, width) = fonts.place(&text.text, text.size, text.bold);
        let scale = fonts.scale(text.size, text.bold);
        let start = match text.anchor {
            Anchor::Start => 0.0,
            Anchor::Middle => -width / 2.0,
            Anchor::End => -width,
        };
        // Along the writing direction every fraction of a pixel counts; the baseline is sharp.
        let (x, y) = text.at;
        let (along, across) = if text.turned { (-y, x) } else { (x, y) };
        let across = across.round() as i32;
        for (id, offset) in glyphs {
            let at = point(along as f32 + start + offset, 0.0);
            let glyph = id.with_scale_and_position(scale, at);
            let Some(outline) = fonts.face(text.bold).outline_glyph(glyph) else {
                continue;
            };
            let corner = outline.px_bounds().min;
            outline.draw(|gx, gy, cover| {
                let u = corner.x as i32 + gx as i32;
                let v = corner.y as i32 + gy as i32;
                let (x, y) = if text.turned {
                    (across + v, -u - 1)
                } else {
                    (u, across + v)
                };
                self.ink(x, y, text.colour, cover);
            });
        }
    }

    fn ink(&mut self, x: i32, y: i32, colour: Rgb, cover: f32) {
        let inside = (0..self.width as i32).contains(&x) && (0..self.height as i32).contains(&y);
        if !inside {
            return;
        }
        let start = (y as usize * self.width + x as usize) * 3;
        let cover = cover.clamp(0.0, 1.0);
        for (byte, ink) in self.rgb[start..start + 3]
            .iter_mut()
            .zip([colour.0, colour.1, colour.2])
        {
            let old = f32::from(*byte);
            *byte = (old + (f32::from(ink) - old) * cover).round() as u8;
        }
    }
}
