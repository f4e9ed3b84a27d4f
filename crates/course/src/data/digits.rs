//! Handwritten digits.

use super::{Images, damaged, read};
use crate::Result;
use candle_core::{Device, Tensor};

/// Handwritten digits, 8 × 8 pixels (UCI, by way of scikit-learn): ink from 0 to 1, shape (n, 64),
/// rows from top to bottom, and the digit from 0 to 9.
pub type Digits = Images;

/// Bytes per digit: 64 pixels and the label.
const RECORD: usize = 65;
/// The ink of a black pixel.
const BLACK: f32 = 16.0;

/// All 1,797 digits, in the order of the source.
///
/// # Errors
/// [`Error::File`](crate::Error::File) when `data/digits.u8` cannot be read, or is not a whole number of digits.
///
/// ```
/// # fn main() -> Result<(), course::Error> {
/// let digits = course::data::digits(&course::candle_core::Device::Cpu)?;
/// assert_eq!(digits.images.dims(), [1797, 64]);
/// assert_eq!(digits.labels.dims(), [1797]);
/// # Ok(())
/// # }
/// ```
pub fn digits(device: &Device) -> Result<Digits> {
    let bytes = read("digits.u8")?;
    if bytes.is_empty() || bytes.len() % RECORD != 0 {
        return Err(damaged(
            "digits.u8",
            "its length is no multiple of 65 bytes",
        ));
    }
    let records = bytes.chunks_exact(RECORD);
    let n = records.len();
    let mut images = Vec::with_capacity(n * (RECORD - 1));
    let mut labels = Vec::with_capacity(n);
    for record in records {
        let (pixels, label) = record.split_at(RECORD - 1);
        images.extend(pixels.iter().map(|&ink| f32::from(ink) / BLACK));
        labels.extend(label.iter().map(|&digit| u32::from(digit)));
    }
    Ok(Digits {
        images: Tensor::from_vec(images, (n, RECORD - 1), device)?,
        labels: Tensor::from_vec(labels, n, device)?,
    })
}

impl Digits {
    /// The digits turned by a quarter, counter-clockwise: the same labels in a world in which
    /// the paper lies on its side.
    ///
    /// # Errors
    /// A candle error when the images are not (n, 64).
    pub fn turned(&self) -> Result<Self> {
        let n = self.len();
        let turned = self
            .images
            .reshape((n, 8, 8))?
            .transpose(1, 2)?
            .contiguous()?
            .flip(&[1])?;
        Ok(Self {
            images: turned.contiguous()?.reshape((n, 64))?,
            labels: self.labels.clone(),
        })
    }

    /// The digits as large as images of clothing: enlarged to 20 × 20 pixels, bilinearly, in the
    /// middle of 28 × 28 black ones, as MNIST places its digits. Shape (n, 1, 28, 28).
    ///
    /// # Errors
    /// A candle error when the images are not (n, 64).
    ///
    /// ```
    /// # fn main() -> Result<(), course::Error> {
    /// let digits = course::data::digits(&course::candle_core::Device::Cpu)?;
    /// assert_eq!(digits.enlarged()?.images.dims(), [1797, 1, 28, 28]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn enlarged(&self) -> Result<Images> {
        let small = self.images.reshape((self.len(), 1, 8, 8))?;
        let large = small.upsample_bilinear2d(20, 20, false)?;
        Ok(Images {
            images: large.pad_with_zeros(2, 4, 4)?.pad_with_zeros(3, 4, 4)?,
            labels: self.labels.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digits_are_what_the_source_says() -> Result<()> {
        let digits = digits(&Device::Cpu)?;
        let labels = digits.labels.to_vec1::<u32>()?;
        let counts: Vec<_> = (0..10)
            .map(|d| labels.iter().filter(|&&l| l == d).count())
            .collect();
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        let ink = digits.images.flatten_all()?.to_vec1::<f32>()?;
        assert!(ink.iter().all(|ink| (0.0..=1.0).contains(ink)));
        // The first record of the source begins 0, 0, 5, 13, 9, 1.
        assert_eq!(ink[..6], [0., 0., 5. / 16., 13. / 16., 9. / 16., 1. / 16.]);
        Ok(())
    }

    #[test]
    fn a_quarter_turn_brings_the_top_right_corner_to_the_top_left() -> Result<()> {
        let mut pixels = vec![0f32; 64];
        pixels[7] = 1.0;
        let digit = Digits {
            images: Tensor::from_vec(pixels, (1, 64), &Device::Cpu)?,
            labels: Tensor::new(&[3u32], &Device::Cpu)?,
        };
        let once = digit.turned()?;
        assert_eq!(once.images.to_vec2::<f32>()?[0][0], 1.0);
        let back = once.turned()?.turned()?.turned()?;
        assert_eq!(
            back.images.to_vec2::<f32>()?,
            digit.images.to_vec2::<f32>()?
        );
        Ok(())
    }

    #[test]
    fn an_enlarged_digit_keeps_its_shape_within_a_black_border() -> Result<()> {
        // Ink that rises along a row, and is the same in all rows.
        let pixels: Vec<f32> = (0..64).map(|i| (i % 8) as f32 / 8.0).collect();
        let digit = Digits {
            images: Tensor::from_vec(pixels, (1, 64), &Device::Cpu)?,
            labels: Tensor::new(&[3u32], &Device::Cpu)?,
        };
        let large = digit.enlarged()?;
        let image = large.images.squeeze(0)?.squeeze(0)?.to_vec2::<f32>()?;
        for (y, row) in image.iter().enumerate() {
            for (x, &ink) in row.iter().enumerate() {
                let inside = (4..24).contains(&y) && (4..24).contains(&x);
                // The middle of pixel x, in pixels of the small digit.
                let place = ((x as f32 - 3.5) * 8.0 / 20.0 - 0.5).clamp(0.0, 7.0);
                let want = if inside { place / 8.0 } else { 0.0 };
                assert!((ink - want).abs() < 1e-6, "{x}, {y}: {ink}, not {want}");
            }
        }
        assert_eq!(large.labels.to_vec1::<u32>()?, [3]);
        Ok(())
    }
}
