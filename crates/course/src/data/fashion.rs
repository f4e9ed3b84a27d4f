//! Fashion-MNIST: photographs of clothing.

use super::{damaged, read, refused, rows};
use crate::Result;
use candle_core::{Device, Tensor};
use flate2::read::GzDecoder;
use std::io::Read;

/// The ten classes, by their label.
pub const FASHION_NAMES: [&str; 10] = [
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
];

/// Side of an image in pixels.
const SIDE: usize = 28;
/// What an IDX file of bytes in one dimension begins with; the last digit is the dimensions.
const LABELS: u32 = 0x0801;
/// The same in three.
const IMAGES: u32 = 0x0803;

/// Clothing in two parts (Zalando's Fashion-MNIST).
#[derive(Debug, Clone)]
pub struct Fashion {
    /// The first 12,000 of the source's training images.
    pub train: Images,
    /// The first 2,000 of its test images.
    pub test: Images,
}

/// Grey images with labels.
#[derive(Debug, Clone)]
pub struct Images {
    /// Light from 0 (black) to 1 (white), shape (n, 1, 28, 28), f32, rows from top to bottom; of
    /// [`Digits`](super::Digits) the ink, shape (n, 64).
    pub images: Tensor,
    /// The class of each, shape (n), u32: a place in [`FASHION_NAMES`], or the digit.
    pub labels: Tensor,
}

/// The images of clothing, in the order of the source.
///
/// # Errors
/// [`Error::File`](crate::Error::File) when a file of `data/fashion` cannot be read or is damaged.
///
/// ```
/// # fn main() -> Result<(), course::Error> {
/// use course::{candle_core::Device, data};
/// let fashion = data::fashion(&Device::Cpu)?;
/// assert_eq!(fashion.train.images.dims(), [12_000, 1, 28, 28]);
/// assert_eq!(fashion.test.len(), 2_000);
/// let first = fashion.train.labels.to_vec1::<u32>()?[0];
/// assert_eq!(data::FASHION_NAMES[first as usize], "boot");
/// # Ok(())
/// # }
/// ```
pub fn fashion(device: &Device) -> Result<Fashion> {
    let part = |part: &str| {
        let images = format!("fashion/{part}-images.gz");
        let labels = format!("fashion/{part}-labels.gz");
        decode(
            (&images, &read(&images)?),
            (&labels, &read(&labels)?),
            device,
        )
    };
    Ok(Fashion {
        train: part("train")?,
        test: part("test")?,
    })
}

/// Images from the name and content of two files.
fn decode(images: (&str, &[u8]), labels: (&str, &[u8]), device: &Device) -> Result<Images> {
    let (n, pixels) = unpack(images, IMAGES, &[SIDE, SIDE])?;
    let (classes, labels_of) = unpack(labels, LABELS, &[])?;
    if classes != n {
        let problem = format!("it has {classes} labels for {n} images");
        return Err(damaged(labels.0, &problem));
    }
    if let Some(label) = labels_of
        .iter()
        .find(|&&l| usize::from(l) >= FASHION_NAMES.len())
    {
        return Err(damaged(labels.0, &format!("there is no class {label}")));
    }
    let light: Vec<f32> = pixels.iter().map(|&p| f32::from(p) / 255.0).collect();
    let label: Vec<u32> = labels_of.iter().map(|&l| u32::from(l)).collect();
    Ok(Images {
        images: Tensor::from_vec(light, (n, 1, SIDE, SIDE), device)?,
        labels: Tensor::from_vec(label, n, device)?,
    })
}

/// Unpacks an IDX file of `magic` kind whose items have the shape `item`: how many there are, and
/// their bytes.
fn unpack((name, packed): (&str, &[u8]), magic: u32, item: &[usize]) -> Result<(usize, Vec<u8>)> {
    let mut bytes = Vec::new();
    GzDecoder::new(packed)
        .read_to_end(&mut bytes)
        .map_err(|error| damaged(name, &format!("it does not unpack ({error})")))?;
    let header = 4 * (2 + item.len());
    let Some((head, items)) = bytes.split_at_checked(header) else {
        return Err(damaged(name, "it ends within its header"));
    };
    let mut numbers = head
        .chunks_exact(4)
        .map(|word| word.iter().fold(0, |n, &byte| (n << 8) | u32::from(byte)));
    let (kind, n) = (
        numbers.next().unwrap_or_default(),
        numbers.next().unwrap_or_default() as usize,
    );
    if kind != magic || !numbers.eq(item.iter().map(|&side| side as u32)) {
        return Err(damaged(name, "its header is another"));
    }
    let want = n * item.iter().product::<usize>();
    if n == 0 || items.len() != want {
        let problem = format!(
            "its header promises {want} bytes of {n} items, and {} follow",
            items.len()
        );
        return Err(damaged(name, &problem));
    }
    Ok((n, items.to_vec()))
}

impl Images {
    /// How many images these are.
    pub fn len(&self) -> usize {
        self.labels.elem_count()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The images at some places, in that order.
    ///
    /// # Errors
    /// A candle error when a place is out of range.
    pub fn at(&self, places: &[usize]) -> Result<Self> {
        Ok(Self {
            images: rows(&self.images, places)?,
            labels: rows(&self.labels, places)?,
        })
    }

    /// The images of some classes, in their order.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) when there is none.
    ///
    /// ```
    /// # fn main() -> Result<(), course::Error> {
    /// use course::{candle_core::Device, data};
    /// let shoes = data::fashion(&Device::Cpu)?.test.of_classes(&[5, 7, 9])?;
    /// assert_eq!(shoes.len(), 583);
    /// assert!(shoes.labels.to_vec1::<u32>()?.iter().all(|label| [5, 7, 9].contains(label)));
    /// # Ok(())
    /// # }
    /// ```
    pub fn of_classes(&self, classes: &[u32]) -> Result<Self> {
        let labels = self.labels.to_vec1::<u32>()?;
        let places = (0..labels.len()).filter(|&i| classes.contains(&labels[i]));
        let places: Vec<usize> = places.collect();
        if places.is_empty() {
            return Err(refused(
                "images",
                format!("none is of the classes {classes:?}"),
            ));
        }
        self.at(&places)
    }

    /// The first `n` images.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) when there are fewer.
    pub fn take(&self, n: usize) -> Result<Self> {
        if n > self.len() {
            let problem = format!("there are {} to take, and you ask for {n}", self.len());
            return Err(refused("images", problem));
        }
        Ok(Self {
            images: self.images.narrow(0, 0, n)?,
            labels: self.labels.narrow(0, 0, n)?,
        })
    }

    /// The images turned by a quarter, counter-clockwise; the labels stay.
    ///
    /// # Errors
    /// A candle error when the images are not (n, 1, height, width).
    pub fn rotated(&self) -> Result<Self> {
        let turned = self.images.transpose(2, 3)?.contiguous()?.flip(&[2])?;
        Ok(Self {
            images: turned.contiguous()?,
            labels: self.labels.clone(),
        })
    }

    /// The negatives, 1 − x; the labels stay.
    ///
    /// # Errors
    /// None that these images could cause; candle's type asks for it.
    pub fn inverted(&self) -> Result<Self> {
        Ok(Self {
            images: self.images.affine(-1.0, 1.0)?,
            labels: self.labels.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    const CPU: Device = Device::Cpu;

    fn counts(images: &Images) -> Result<Vec<usize>> {
        let labels = images.labels.to_vec1::<u32>()?;
        Ok((0..10)
            .map(|c| labels.iter().filter(|&&l| l == c).count())
            .collect())
    }

    #[test]
    fn the_images_are_what_the_source_says() -> Result<()> {
        let fashion = fashion(&CPU)?;
        assert_eq!(
            counts(&fashion.train)?,
            [1122, 1220, 1201, 1212, 1181, 1204, 1244, 1192, 1195, 1229]
        );
        assert_eq!(
            counts(&fashion.test)?,
            [200, 203, 214, 190, 219, 195, 197, 200, 194, 188]
        );
        let labels = fashion.train.labels.to_vec1::<u32>()?;
        assert_eq!(labels[..10], [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]);
        // Row 3 of the first image, a boot, from column 12 on, in the source's bytes.
        let row = fashion.train.images.get(0)?.get(0)?.get(3)?;
        let row = row.affine(255.0, 0.0)?.round()?.to_vec1::<f32>()?;
        assert_eq!(row[12..20], [1.0, 0.0, 0.0, 13.0, 73.0, 0.0, 0.0, 1.0]);
        for part in [&fashion.train, &fashion.test] {
            assert_eq!(part.images.max_all()?.to_scalar::<f32>()?, 1.0);
            assert_eq!(part.images.min_all()?.to_scalar::<f32>()?, 0.0);
        }
        Ok(())
    }

    /// Two images: one with light in its top right corner, one in its bottom left.
    fn two() -> Result<Images> {
        let mut light = vec![0f32; 2 * SIDE * SIDE];
        light[SIDE - 1] = 1.0;
        light[2 * SIDE * SIDE - SIDE] = 0.25;
        Ok(Images {
            images: Tensor::from_vec(light, (2, 1, SIDE, SIDE), &CPU)?,
            labels: Tensor::new(&[3u32, 5], &CPU)?,
        })
    }

    fn corners(images: &Images) -> Result<Vec<[f32; 4]>> {
        let light = images.images.squeeze(1)?.to_vec3::<f32>()?;
        let end = SIDE - 1;
        Ok(light
            .iter()
            .map(|l| [l[0][0], l[0][end], l[end][0], l[end][end]])
            .collect())
    }

    #[test]
    fn a_quarter_turn_goes_counter_clockwise() -> Result<()> {
        let images = two()?;
        let once = images.rotated()?;
        // Top right comes to the top left, bottom left to the bottom right.
        assert_eq!(
            corners(&once)?,
            [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.25]]
        );
        assert_eq!(once.labels.to_vec1::<u32>()?, [3, 5]);
        let back = once.rotated()?.rotated()?.rotated()?;
        assert_eq!(corners(&back)?, corners(&images)?);
        Ok(())
    }

    #[test]
    fn negatives_places_and_the_first_few() -> Result<()> {
        let images = two()?;
        assert_eq!(corners(&images.inverted()?)?[1], [1.0, 1.0, 0.75, 1.0]);
        let swapped = images.at(&[1, 0, 1])?;
        assert_eq!(swapped.labels.to_vec1::<u32>()?, [5, 3, 5]);
        assert_eq!(corners(&swapped)?[1], [0.0, 1.0, 0.0, 0.0]);
        assert!(images.at(&[2]).is_err());
        let first = images.take(1)?;
        assert_eq!(first.labels.to_vec1::<u32>()?, [3]);
        assert_eq!(corners(&first)?, [[0.0, 1.0, 0.0, 0.0]]);
        assert!(images.take(0)?.is_empty());
        let said = images.take(3).unwrap_err().to_string();
        assert!(said.contains("there are 2") && said.contains('3'), "{said}");
        Ok(())
    }

    fn packed(words: &[u32], content: &[u8]) -> Vec<u8> {
        let mut file = GzEncoder::new(Vec::new(), Compression::fast());
        for word in words {
            file.write_all(&word.to_be_bytes()).unwrap();
        }
        file.write_all(content).unwrap();
        file.finish().unwrap()
    }

    #[test]
    fn a_damaged_file_says_what_is_wrong_and_how_to_get_it_back() {
        let pixels = [7; 2 * SIDE * SIDE];
        let images = packed(&[IMAGES, 2, 28, 28], &pixels);
        let labels = packed(&[LABELS, 2], &[0, 9]);
        let load = |images: &[u8], labels: &[u8]| decode(("i.gz", images), ("l.gz", labels), &CPU);
        assert_eq!(load(&images, &labels).unwrap().len(), 2);
        let cut = &images[..images.len() - 12];
        for (images, labels, name, says) in [
            (cut, &labels[..], "i.gz", "does not unpack"),
            (b"text", &labels, "i.gz", "does not unpack"),
            (
                &packed(&[IMAGES, 2], &[0]),
                &labels,
                "i.gz",
                "within its header",
            ),
            (
                &packed(&[LABELS, 2, 28, 28], &pixels),
                &labels,
                "i.gz",
                "header",
            ),
            (
                &packed(&[IMAGES, 2, 28, 27], &pixels),
                &labels,
                "i.gz",
                "header",
            ),
            (
                &packed(&[IMAGES, 2, 28, 28], &pixels[1..]),
                &labels,
                "i.gz",
                "1567 follow",
            ),
            (
                &packed(&[IMAGES, 1, 28, 28], &pixels),
                &labels,
                "i.gz",
                "1568 follow",
            ),
            (
                &images,
                &packed(&[LABELS, 3], &[0, 9, 1]),
                "l.gz",
                "3 labels for 2 images",
            ),
            (
                &images,
                &packed(&[LABELS, 2], &[0, 10]),
                "l.gz",
                "no class 10",
            ),
        ] {
            let said = load(images, labels).unwrap_err().to_string();
            assert!(said.starts_with(&format!("data/{name}: ")), "{said}");
            assert!(
                said.contains(says) && said.contains("git restore data"),
                "{said}"
            );
        }
    }
}
