//! Bounds on what a template can build.
//!
//! The engine's fuel counts instructions, not bytes: `{% set ns.x = ns.x ~ ns.x %}` doubles a string with each, and `[x, x]`
//! a tree. So the compiled instructions are rewritten before they run. Every value that an instruction built is measured, as
//! the tree that a reader of it would walk, and counted against a total; operations whose result can be the product of
//! their operands check it beforehand. No value that a template holds is then larger than [`MAX_VALUE`], so what an
//! operation adds to its operands is bounded as well.
//!
//! The rewriting uses the engine's `unstable_machinery`, which promises no stability between versions; that is why the
//! workspace names the exact version. There is no stable hook: operators cannot be overridden, and strings are no objects.
//!
//! What remains: an operation over values of the allowed size may take time in proportion to it, without being charged for it
//! where its result is small (a filter with arguments that searches a long text). At most [`super::FUEL`] of them can run.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use minijinja::{
    Environment, Error, ErrorKind, State, Value, filters,
    machinery::{CompiledTemplate, Instruction, Instructions},
    value::{Rest, Tuple, ValueKind, ValueOrKwargs},
};

use super::{python, slice};

/// Largest value that a template may build, in bytes as [`size`] counts them: texts far beyond any context.
pub(super) const MAX_VALUE: usize = 8 << 20;
/// Everything that one rendering may build, what it has given up included.
const MAX_TOTAL: usize = 1 << 30;
/// What a list, a dict, a number counts besides its contents.
const NODE: usize = 64;
/// Deepest nesting of a value that a template builds.
const MAX_NESTING: usize = 200;
/// Instructions that the rewriting adds for one, at most; the fuel grows with it.
pub(super) const INSTRUCTIONS_PER_ONE: u64 = 3;

// Names that no template can write: they contain blanks.
const GUARD: &str = "guard value";
const STORE: &str = "guard attribute";
const CONCAT: &str = "guard concatenation";
const MULTIPLY: &str = "guard product";
const SLICED: &str = "guard sliced";

/// Counts what one rendering builds.
#[derive(Clone, Debug, Default)]
pub(super) struct Meter(Arc<AtomicUsize>);

impl Meter {
    fn charge(&self, bytes: usize) -> Result<(), Error> {
        let before = self.0.fetch_add(bytes, Ordering::Relaxed);
        match before.saturating_add(bytes) > MAX_TOTAL {
            true => Err(fault("the template builds too many values")),
            false => Ok(()),
        }
    }

    /// Measures a value that was just built.
    pub(super) fn pass(&self, value: Value) -> Result<Value, Error> {
        let mut left = MAX_VALUE;
        measure(&value, 0, &mut left)?;
        self.charge(MAX_VALUE - left)?;
        Ok(value)
    }
}

fn fault(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn too_large() -> Error {
    fault(format!("the template builds a value of more than {MAX_VALUE} bytes"))
}

/// Takes the size of the tree below `value` from `left`: shared parts count each time that a reader would meet them.
fn measure(value: &Value, depth: usize, left: &mut usize) -> Result<(), Error> {
    if depth > MAX_NESTING {
        return Err(fault(format!("the template nests values deeper than {MAX_NESTING}")));
    }
    // Of texts as well as of bytes.
    let own = NODE + value.as_bytes().map_or(0, <[u8]>::len);
    *left = left.checked_sub(own).ok_or_else(too_large)?;
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()? {
                measure(&item, depth + 1, left)?;
            }
        }
        // A namespace can change after it was measured, and be put into itself: it stays outside of other values.
        ValueKind::Map if depth > 0 && is_namespace(value) => {
            return Err(fault("a namespace cannot be put into another value"));
        }
        ValueKind::Map => {
            for key in value.try_iter()? {
                measure(&key, depth + 1, left)?;
                measure(&value.get_item(&key)?, depth + 1, left)?;
            }
        }
        _ => {}
    }
    Ok(())
}

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|o| o.type_name().ends_with("::Namespace"))
}

/// The template with its bounds built in.
pub(super) struct Bounded<'env> {
    pub(super) instructions: Instructions<'env>,
    pub(super) blocks: BTreeMap<&'env str, Instructions<'env>>,
}

impl<'env> Bounded<'env> {
    /// Rewrites all of a template.
    ///
    /// # Errors
    /// It includes, imports or extends another template.
    pub(super) fn new(compiled: &CompiledTemplate<'env>) -> Result<Self, String> {
        let blocks = compiled.blocks.iter().map(|(name, code)| Ok((*name, rewrite(code)?)));
        Ok(Bounded {
            instructions: rewrite(&compiled.instructions)?,
            blocks: blocks.collect::<Result<_, String>>()?,
        })
    }
}

/// Puts guards behind whatever builds a value, and moves the targets of jumps along.
fn rewrite<'env>(code: &Instructions<'env>) -> Result<Instructions<'env>, String> {
    let old: Vec<&Instruction<'env>> = (0..).map_while(|i| code.get(i)).collect();
    let mut moved = Vec::with_capacity(old.len() + 1);
    let mut next = 0;
    for instruction in &old {
        moved.push(next);
        next += guarded(instruction)?.len() as u32;
    }
    moved.push(next);
    // A target beyond the end ends the program, as before.
    let target = |old: &u32| moved.get(*old as usize).copied().unwrap_or(u32::MAX);
    let mut new = Instructions::new(code.name(), code.source());
    for (i, instruction) in old.iter().enumerate() {
        let (span, line) = (code.get_span(i as u32), code.get_line(i as u32));
        for part in guarded(instruction)? {
            let part = match &part {
                Instruction::Iterate(to) => Instruction::Iterate(target(to)),
                Instruction::Jump(to) => Instruction::Jump(target(to)),
                Instruction::JumpIfFalse(to) => Instruction::JumpIfFalse(target(to)),
                Instruction::JumpIfFalseOrPop(to) => Instruction::JumpIfFalseOrPop(target(to)),
                Instruction::JumpIfTrueOrPop(to) => Instruction::JumpIfTrueOrPop(target(to)),
                Instruction::BuildMacro(name, to, flags) => Instruction::BuildMacro(name, target(to), *flags),
                _ => part,
            };
            match (span, line.and_then(|l| u16::try_from(l).ok())) {
                (Some(span), _) => new.add_with_span(part, span),
                (None, Some(line)) => new.add_with_line(part, line),
                (None, None) => new.add(part),
            };
        }
    }
    Ok(new)
}

/// What runs in place of one instruction.
fn guarded<'env>(instruction: &Instruction<'env>) -> Result<Vec<Instruction<'env>>, String> {
    let guard = || Instruction::CallFunction(GUARD, Some(1));
    Ok(match instruction {
        // Printed like any value, so that text of the template counts as output also within captured blocks.
        Instruction::EmitRaw(text) => vec![Instruction::LoadConst(Value::from(*text)), Instruction::Emit],
        Instruction::StringConcat => vec![Instruction::CallFunction(CONCAT, Some(2))],
        Instruction::Mul => vec![Instruction::CallFunction(MULTIPLY, Some(2))],
        Instruction::Add
        | Instruction::BuildMap(_)
        | Instruction::BuildList(_)
        | Instruction::BuildTuple(_)
        | Instruction::EndCapture
        | Instruction::ApplyFilter(..)
        | Instruction::CallFunction(..)
        | Instruction::CallMethod(..)
        | Instruction::CallObject(_) => vec![instruction.clone(), guard()],
        // A copy of its operand's characters comes before its result.
        Instruction::Slice => {
            let read = Instruction::CallFunction(SLICED, Some(4));
            vec![read, Instruction::UnpackList(4), instruction.clone(), guard()]
        }
        // They read all of their last operand.
        Instruction::Eq
        | Instruction::Ne
        | Instruction::Lt
        | Instruction::Lte
        | Instruction::Gt
        | Instruction::Gte
        | Instruction::In
        | Instruction::CompareAndPreserve(_) => vec![guard(), instruction.clone()],
        Instruction::SetAttr(_) => {
            let store = Instruction::CallFunction(STORE, Some(1));
            vec![Instruction::Swap, store, Instruction::Swap, instruction.clone()]
        }
        Instruction::Include(_) | Instruction::LoadBlocks => {
            return Err(
                "includes, imports or extends another template, which a model file cannot hold".into()
            );
        }
        _ => vec![instruction.clone()],
    })
}

/// Makes the guards and the checked filters known.
pub(super) fn install(env: &mut Environment<'_>, meter: &Meter) {
    let m = meter.clone();
    env.add_function(GUARD, move |value: Value| m.pass(value));
    let m = meter.clone();
    env.add_function(STORE, move |value: Value| match is_namespace(&value) {
        true => Err(fault("a namespace cannot be put into another one")),
        false => m.pass(value),
    });
    let m = meter.clone();
    env.add_function(CONCAT, move |left: Value, right: Value| {
        m.pass(Value::from(python::to_str(&left)? + &python::to_str(&right)?))
    });
    let m = meter.clone();
    // The operands in the order in which a list is unpacked.
    env.add_function(SLICED, move |value: Value, start: Value, stop: Value, step: Value| {
        let value = m.pass(value)?;
        Ok(match slice::backwards(&value, &start, &stop, &step) {
            // All of it.
            Some(taken) => vec![Value::from(()), Value::from(()), Value::from(()), taken],
            None => vec![step, stop, start, value],
        })
    });
    let m = meter.clone();
    env.add_function(MULTIPLY, move |left: Value, right: Value| m.pass(product(&left, &right)?));
    checked(env, meter, "replace", Value::from_function(filters::replace), |args| {
        let [text, old, new] = args else { return 0 };
        replaced(&text_of(text), &text_of(old), &text_of(new))
    });
    checked(env, meter, "join", Value::from_function(filters::join), |args| {
        let [items, joiner, ..] = args else { return 0 };
        items.len().unwrap_or(0).saturating_mul(text_of(joiner).len())
    });
    checked(env, meter, "format", Value::from_function(filters::format), formatted);
    checked(env, meter, "indent", Value::from_function(filters::indent), |args| {
        let Some((text, rest)) = args.split_first() else { return 0 };
        let lines = text_of(text).matches('\n').count() + 1;
        lines.saturating_mul(numbers(rest))
    });
    checked(env, meter, "batch", Value::from_function(filters::batch), |args| {
        numbers(args).saturating_mul(NODE)
    });
    checked(env, meter, "slice", Value::from_function(filters::slice), |args| {
        numbers(args).saturating_mul(NODE)
    });
}

/// A filter that runs only if `estimate`, an upper bound of what its arguments lead to, is allowed.
fn checked(
    env: &mut Environment<'_>,
    meter: &Meter,
    name: &'static str,
    original: Value,
    estimate: impl Fn(&[Value]) -> usize + Send + Sync + 'static,
) {
    let meter = meter.clone();
    env.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
        let args = args.into_values();
        let estimate = estimate(&args);
        if estimate > MAX_VALUE {
            return Err(too_large());
        }
        meter.charge(estimate)?;
        original.call(state, &args)
    });
}

/// Refuses methods whose result would be too large; the others add at most a factor to what they read.
pub(super) fn check_method(name: &str, text: &str, args: &[Value]) -> Result<(), Error> {
    let estimate = match (name, args) {
        ("replace", [old, new, ..]) => replaced(text, &text_of(old), &text_of(new)),
        ("join", [items]) => items.len().unwrap_or(0).saturating_mul(text.len()),
        ("format", _) => {
            let all: Vec<Value> = std::iter::once(Value::from(text)).chain(args.iter().cloned()).collect();
            formatted(&all)
        }
        _ => 0,
    };
    if estimate > MAX_VALUE { Err(too_large()) } else { Ok(()) }
}

/// Length of `text` after a replacement, or more.
fn replaced(text: &str, old: &str, new: &str) -> usize {
    let times = if old.is_empty() { text.len() + 1 } else { text.matches(old).count() };
    times.saturating_mul(new.len())
}

/// Length of a formatted text, or more: every directive could print all arguments, padded to every number in sight.
fn formatted(args: &[Value]) -> usize {
    let Some((format, rest)) = args.split_first() else { return 0 };
    let format = text_of(format);
    let directives = format.matches(['%', '{']).count();
    let written = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| digits.len() > 1);
    let widths = written.fold(0, |sum: usize, d| sum.saturating_add(d.parse().unwrap_or(usize::MAX)));
    // `%*d` and `{:{}}` take their width from an argument.
    let dynamic = if format.contains('*') || has_nested_braces(&format) { numbers(rest) } else { 0 };
    let mut left = MAX_VALUE;
    let measured = rest.iter().try_for_each(|a| measure(a, 0, &mut left));
    let arguments =
        if measured.is_ok() { (MAX_VALUE - left).saturating_sub(NODE * rest.len()) } else { MAX_VALUE };
    directives.saturating_mul(arguments.saturating_add(dynamic)).saturating_add(widths)
}

fn has_nested_braces(format: &str) -> bool {
    let mut depth = 0usize;
    format.chars().any(|c| {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth > 1
    })
}

/// The whole numbers among arguments, named ones included, summed up.
fn numbers(args: &[Value]) -> usize {
    let number = |v: &Value| v.as_i64().map_or(0, |n| usize::try_from(n).unwrap_or(0));
    let one = |v: &Value| match v.is_kwargs() {
        true => {
            v.try_iter().into_iter().flatten().filter_map(|k| v.get_item(&k).ok()).map(|v| number(&v)).sum()
        }
        false => number(v),
    };
    args.iter().map(one).fold(0, usize::saturating_add)
}

/// A text as filters see their argument.
fn text_of(value: &Value) -> std::borrow::Cow<'_, str> {
    match value.as_str() {
        Some(text) => text.into(),
        None => python::to_str(value).unwrap_or_default().into(),
    }
}

/// `left * right`: texts and lists repeat.
fn product(left: &Value, right: &Value) -> Result<Value, Error> {
    let (value, times) = if left.is_number() { (right, left) } else { (left, right) };
    let times = || {
        let n = times.as_i64().filter(|_| times.is_integer());
        let n = n.ok_or_else(|| fault("texts and lists can only be multiplied by whole numbers"))?;
        Ok::<_, Error>(usize::try_from(n).unwrap_or(0))
    };
    if let Some(text) = value.as_str() {
        let n = times()?;
        return if text.len().saturating_mul(n) > MAX_VALUE {
            Err(too_large())
        } else {
            Ok(text.repeat(n).into())
        };
    }
    if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        let items: Vec<Value> = value.try_iter()?.take(MAX_VALUE / NODE).collect();
        let n = times()?;
        if items.len().saturating_mul(n).saturating_mul(NODE) > MAX_VALUE {
            return Err(too_large());
        }
        let repeated: Vec<Value> = items.iter().cycle().take(items.len() * n).cloned().collect();
        return Ok(if value.is_tuple() { Tuple::from(repeated).into() } else { repeated.into() });
    }
    let whole = |v: &Value| {
        let is_whole = v.is_integer() || v.kind() == ValueKind::Bool;
        if is_whole { i128::try_from(v.clone()).ok() } else { None }
    };
    let float = |v: &Value| f64::try_from(v.clone()).ok();
    match (whole(left), whole(right)) {
        (Some(a), Some(b)) => {
            let n = a.checked_mul(b).ok_or_else(|| fault("the product of two numbers is too large"))?;
            Ok(i64::try_from(n).map_or_else(|_| Value::from(n), Value::from))
        }
        _ => match (float(left), float(right)) {
            (Some(a), Some(b)) => Ok(Value::from(a * b)),
            _ => Err(fault(format!("{} and {} cannot be multiplied", left.kind(), right.kind()))),
        },
    }
}
