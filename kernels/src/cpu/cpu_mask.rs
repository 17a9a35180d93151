//! Sets of processors, as the system numbers them.

use std::fmt;
use std::io;
use std::ops::BitAnd;
use std::str::FromStr;

/// A set of processors with numbers below [`CpuMask::MAX`], as many as a `cpu_set_t` of Linux has room for.
///
/// Written as llama.cpp's `--cpu-mask`: in hexadecimal, processor 0 being the lowest bit (`0x5` is 0 and 2).
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuMask([u64; CpuMask::MAX / 64]);

impl CpuMask {
    /// Processors that there is room for.
    pub const MAX: usize = 1024;

    /// Whether none is in it.
    pub fn is_empty(&self) -> bool {
        *self == CpuMask::default()
    }

    /// How many are in it.
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether this one is in it.
    pub fn contains(&self, cpu: usize) -> bool {
        self.0.get(cpu / 64).is_some_and(|word| word >> (cpu % 64) & 1 == 1)
    }

    /// Those in it, from the lowest number.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..CpuMask::MAX).filter(|cpu| self.contains(*cpu))
    }

    /// Those of a list as Linux writes it, `0-3,8`; what has no place or is no number is left out.
    fn from_list(list: &str) -> CpuMask {
        let range = |range: &str| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
            Some(first..=last.min(CpuMask::MAX - 1))
        };
        list.trim().split(',').filter_map(range).flatten().collect()
    }

    /// Those of each memory node; none where the system tells of no nodes.
    pub fn nodes() -> Vec<CpuMask> {
        let list =
            |node| std::fs::read_to_string(format!("/sys/devices/system/node/node{node}/cpulist")).ok();
        // A node may have no processors, and numbers may be missing.
        (0..1024)
            .filter_map(list)
            .map(|list| CpuMask::from_list(&list))
            .filter(|node| !node.is_empty())
            .collect()
    }

    /// Those of the memory node that the calling thread runs on just now; `None` where the system does not tell, as any but Linux.
    pub fn of_this_node() -> Option<CpuMask> {
        #[cfg(target_os = "linux")]
        {
            // SAFETY: it takes nothing and returns a number.
            let cpu = usize::try_from(unsafe { libc::sched_getcpu() }).ok()?;
            CpuMask::nodes().into_iter().find(|node| node.contains(cpu))
        }
        #[cfg(not(target_os = "linux"))]
        None
    }

    /// Those that the calling thread may run on.
    ///
    /// # Errors
    /// The system's; on any but Linux, that there is no such thing.
    pub fn of_this_thread() -> io::Result<CpuMask> {
        #[cfg(target_os = "linux")]
        {
            let (mut mask, bytes) = (CpuMask::default(), size_of::<CpuMask>());
            // SAFETY: the words are as long as is said, and any bits are a mask.
            match unsafe { libc::sched_getaffinity(0, bytes, mask.0.as_mut_ptr().cast()) } {
                0 => Ok(mask),
                _ => Err(io::Error::last_os_error()),
            }
        }
        #[cfg(not(target_os = "linux"))]
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Keeps the calling thread, and those that it starts from now on, on these.
    ///
    /// # Errors
    /// The system's, if there is none of them for one; on any but Linux, that there is no such thing.
    pub fn confine(&self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        {
            // SAFETY: the words are as long as is said.
            match unsafe { libc::sched_setaffinity(0, size_of::<CpuMask>(), self.0.as_ptr().cast()) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        }
        #[cfg(not(target_os = "linux"))]
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// What has no place is left out.
impl FromIterator<usize> for CpuMask {
    fn from_iter<I: IntoIterator<Item = usize>>(cpus: I) -> CpuMask {
        let mut mask = CpuMask::default();
        for cpu in cpus {
            if let Some(word) = mask.0.get_mut(cpu / 64) {
                *word |= 1 << (cpu % 64);
            }
        }
        mask
    }
}

impl BitAnd for CpuMask {
    type Output = CpuMask;

    fn bitand(mut self, other: CpuMask) -> CpuMask {
        self.0.iter_mut().zip(other.0).for_each(|(word, other)| *word &= other);
        self
    }
}

impl FromStr for CpuMask {
    type Err = String;

    fn from_str(text: &str) -> Result<CpuMask, String> {
        let digits = text.strip_prefix("0x").or(text.strip_prefix("0X")).unwrap_or(text);
        if !(1..=CpuMask::MAX / 4).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(format!(
                "expected processors as 1 to {} hexadecimal digits, as in 0xff",
                CpuMask::MAX / 4
            ));
        }
        let bits = |(i, digit): (usize, char)| {
            let digit = digit.to_digit(16).unwrap_or(0);
            (0..4).filter(move |bit| digit >> bit & 1 == 1).map(move |bit| 4 * i + bit)
        };
        Ok(digits.chars().rev().enumerate().flat_map(bits).collect())
    }
}

impl fmt::Display for CpuMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits: String = self.0.iter().rev().map(|word| format!("{word:016x}")).collect();
        let significant = digits.trim_start_matches('0');
        write!(f, "0x{}", if significant.is_empty() { "0" } else { significant })
    }
}

impl fmt::Debug for CpuMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_read_and_written_in_hexadecimal() {
        let mask = |text: &str| text.parse::<CpuMask>();
        assert_eq!(mask("0x5").unwrap().iter().collect::<Vec<_>>(), [0, 2]);
        assert_eq!(mask("Ff").unwrap().len(), 8);
        assert!(mask("0").unwrap().is_empty());
        for text in ["0x0", "0x5", "0x8000000000000001", "0x10000000000000000"] {
            assert_eq!(mask(text).unwrap().to_string(), text);
        }
        let all = mask(&"f".repeat(256)).unwrap();
        assert_eq!((all.len(), all.contains(1023), all.contains(1024)), (1024, true, false));
        for wrong in ["", "0x", "-1", "+1", "0xg", "1 2", "0x0x1", &"0".repeat(257), "é"] {
            assert!(mask(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lists_are_read_as_linux_writes_them() {
        let list = |text| CpuMask::from_list(text).iter().collect::<Vec<_>>();
        assert_eq!(list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(list("5"), [5]);
        assert_eq!(list("\n"), [0; 0]);
        assert_eq!(list("3-1,x,1022-99999999"), [1022, 1023]);
    }

    #[test]
    fn sets_are_intersected() {
        let (a, b): (CpuMask, CpuMask) = ((0..70).collect(), (60..2000).collect());
        assert_eq!((a & b).iter().collect::<Vec<_>>(), (60..70).collect::<Vec<_>>());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_stays_where_it_is_put() {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let all = CpuMask::of_this_thread().unwrap();
                let last: CpuMask = all.iter().last().into_iter().collect();
                last.confine().unwrap();
                assert_eq!(CpuMask::of_this_thread().unwrap(), last);
                assert!(CpuMask::default().confine().is_err());
                // It has the same node before and after.
                let node = CpuMask::of_this_node();
                assert!(node.is_none_or(|node| !(node & last).is_empty()), "{node:?}");
            });
        });
    }
}
