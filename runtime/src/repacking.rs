//! Whether weights are copied into the order in which the processor reads them best.

use std::fs;

/// See [`crate::EngineOptions::repacking`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repacking {
    /// Weights are used where they are mapped: memory holds them once, and processes share them.
    #[default]
    Off,
    /// Every weight whose format has a kernel for it is copied when the model is opened: Q8_0, Q4_0, Q4_K, Q5_K and Q6_K.
    /// Memory of this process grows by their bytes; results stay the same bit for bit.
    On,
    /// `On` if the system has three times the weights' bytes available, so that the copies displace nothing (Linux;
    /// elsewhere `Off`).
    Auto,
}

impl Repacking {
    /// For weights of so many bytes.
    pub(crate) fn decide(self, bytes: usize) -> bool {
        match self {
            Repacking::Off => false,
            Repacking::On => true,
            Repacking::Auto => {
                let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
                available.is_some_and(|available| available >= bytes.saturating_mul(3))
            }
        }
    }
}

/// From the text of `/proc/meminfo`.
fn available(text: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_available_is_read_in_bytes() {
        let text = "MemTotal:       24690444 kB\nMemAvailable:   23456789 kB\n";
        assert_eq!(available(text), Some(23_456_789 * 1024));
        assert_eq!(available("MemTotal: 5 kB\n"), None);
        assert_eq!(available("MemAvailable: much\n"), None);
    }

    #[test]
    fn auto_wants_room_to_spare() {
        assert!(!Repacking::Auto.decide(usize::MAX));
        assert!(Repacking::On.decide(usize::MAX) && !Repacking::Off.decide(1));
    }
}
