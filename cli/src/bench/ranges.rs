//! Lists and ranges of numbers, as llama-bench reads them: `1,2`, `1-4`, `8-64+8`, `8-512*2`.

use std::str::FromStr;

use lory_runtime::GpuLayers;

use crate::model_flags::gpu_layers;

/// One flag's values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbers(pub Vec<usize>);

/// Values of one flag at most: a range that goes on for ever is a mistake.
const MOST: usize = 10_000;

impl FromStr for Numbers {
    type Err = String;

    fn from_str(text: &str) -> Result<Numbers, String> {
        let mut numbers = Vec::new();
        for item in text.split(',') {
            range(item, &mut numbers).map_err(|e| format!("`{item}`: {e}"))?;
        }
        Ok(Numbers(numbers))
    }
}

fn number(text: &str) -> Result<usize, String> {
    text.trim()
        .parse()
        .map_err(|_| "not a number; write N, N,M, FIRST-LAST, FIRST-LAST+STEP or FIRST-LAST*FACTOR".into())
}

/// How a range goes on.
#[derive(Clone, Copy)]
enum Step {
    Plus(usize),
    Times(usize),
}

fn range(item: &str, out: &mut Vec<usize>) -> Result<(), String> {
    let Some((first, rest)) = item.split_once('-') else {
        out.push(number(item)?);
        return Ok(());
    };
    let (last, step) = match (rest.split_once('+'), rest.split_once('*')) {
        (Some((last, step)), _) => (last, Step::Plus(number(step)?)),
        (None, Some((last, factor))) => (last, Step::Times(number(factor)?)),
        (None, None) => (rest, Step::Plus(1)),
    };
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(format!("{first} is more than {last}"));
    }
    let mut n = first;
    while n <= last {
        if out.len() == MOST {
            return Err(format!("more than {MOST} values"));
        }
        out.push(n);
        let next = match step {
            Step::Plus(m) => n.checked_add(m),
            Step::Times(m) => n.checked_mul(m),
        };
        match next {
            Some(more) if more > n => n = more,
            Some(_) => return Err("a range that does not grow".into()),
            None => break,
        }
    }
    Ok(())
}

/// `-ngl`: numbers of layers, auto or all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layers(pub Vec<GpuLayers>);

impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Layers, String> {
        let mut layers = Vec::new();
        for item in text.split(',') {
            match gpu_layers(item) {
                Ok(n) => layers.push(n),
                Err(_) => layers.extend(item.parse::<Numbers>()?.0.into_iter().map(GpuLayers::Last)),
            }
        }
        Ok(Layers(layers))
    }
}

/// `-pg PP,TG`: a prompt and a generation after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptAndGeneration(pub usize, pub usize);

impl FromStr for PromptAndGeneration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (pp, tg) = text.split_once(',').ok_or("write PROMPT,GENERATED, such as 512,128")?;
        Ok(PromptAndGeneration(number(pp)?, number(tg)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(text: &str) -> Vec<usize> {
        text.parse::<Numbers>().unwrap().0
    }

    #[test]
    fn lists_and_ranges() {
        assert_eq!(numbers("512"), [512]);
        assert_eq!(numbers("1,4,2"), [1, 4, 2]);
        assert_eq!(numbers("1-4"), [1, 2, 3, 4]);
        assert_eq!(numbers("8-32+8,7"), [8, 16, 24, 32, 7]);
        assert_eq!(numbers("8-100*2"), [8, 16, 32, 64]);
        assert_eq!("512,128".parse(), Ok(PromptAndGeneration(512, 128)));
        let layers = |text: &str| text.parse::<Layers>().unwrap().0;
        let last = GpuLayers::Last;
        assert_eq!(layers("0,99"), [last(0), last(99)]);
        assert_eq!(layers("8-24+8,all"), [last(8), last(16), last(24), last(usize::MAX)]);
        assert_eq!((layers("auto"), layers("-1")), (vec![GpuLayers::Fit], vec![GpuLayers::Fit]));
    }

    #[test]
    fn nonsense_is_named() {
        for bad in ["", "x", "4-1", "1-4+0", "1-4*1", "0-4*2", "1-99999999", "1--2", "-5", "1-2+x"] {
            let error = bad.parse::<Numbers>().unwrap_err();
            assert!(error.contains('`'), "{bad}: {error}");
        }
        assert!("512".parse::<PromptAndGeneration>().is_err());
        for bad in ["", "x", "4-1", "1,,2", "auto-4"] {
            assert!(bad.parse::<Layers>().is_err(), "{bad}");
        }
    }
}
