//! One small image: checking its values, and enlarging it.

use super::check::Check;
use super::scene::Picture;
use super::words::count;
use crate::error::Result;

/// Values from 0 to 1, row by row.
#[derive(Debug, Clone)]
pub(super) struct Image {
    pub label: String,
    pub width: usize,
    pub height: usize,
    /// 1 for gray, 3 for red, green and blue.
    pub channels: usize,
    pub values: Vec<f64>,
}

impl Image {
    pub fn validate(&self, check: Check<'_>, index: usize) -> Result<()> {
        let whose = format!("image \"{}\" (number {index}, counted from 0)", self.label);
        check.text(
            &format!("the label of image {index} (counted from 0)"),
            &self.label,
        )?;
        let (width, height) = (self.width, self.height);
        check.need(
            (1..=4000).contains(&width) && (1..=4000).contains(&height),
            || format!("{whose} is {width} × {height} pixels: each side must have 1 to 4000"),
        )?;
        let needed = width * height * self.channels;
        check.need(self.values.len() == needed, || {
            format!(
                "{whose} has {} values, but {width} × {height} pixels with {} each need \
                 {needed}: check width, height, and whether it is .gray() or .rgb()",
                self.values.len(),
                count(self.channels, "value"),
            )
        })?;
        let wrong = self.values.iter().position(|v| !(0.0..=1.0).contains(v));
        match wrong {
            Some(at) => Err(check.fail(format!(
                "{whose} has the value {:?} at index {at}, outside 0 to 1: divide by 255 \
                 or rescale the values",
                self.values[at]
            ))),
            None => Ok(()),
        }
    }

    /// The image with each pixel `zoom` wide and high, centred in a cell.
    pub fn enlarged(&self, zoom: u32, left: u32, top: u32, cell: u32) -> Picture {
        let (width, height) = (self.width as u32 * zoom, self.height as u32 * zoom);
        let mut rgb = Vec::with_capacity((width * height * 3) as usize);
        for y in 0..height as usize {
            for x in 0..width as usize {
                let pixel = (y / zoom as usize) * self.width + x / zoom as usize;
                for channel in 0..3 {
                    let value = self.values[pixel * self.channels + channel.min(self.channels - 1)];
                    rgb.push((value * 255.0).round() as u8);
                }
            }
        }
        Picture {
            left: left + (cell - width) / 2,
            top,
            width,
            height,
            rgb,
        }
    }
}
