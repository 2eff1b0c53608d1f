//! Python objects to JSON text and back, exactly: integers of any size keep their digits, and what JSON cannot say is
//! refused with the place where it stands.
//!
//! Not orjson or msgspec when they happen to be importable: they write NaN as null, refuse or round large integers, and
//! an event's bytes must not depend on what else is installed.

use std::hash::{BuildHasher, Hasher};
use std::sync::Mutex;

use jiter::{Jiter, JiterError, JiterErrorType, JsonErrorType, Peek};
use pyo3::exceptions::PyRecursionError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple, PyType};

use crate::error::invalid_event;

/// The JSON text of `value`. `root` names it in messages, `depth` limits its nesting.
pub fn encode(value: &Bound<'_, PyAny>, root: &str, depth: usize) -> PyResult<Vec<u8>> {
    let mut out = Vec::with_capacity(256);
    write(&mut out, value, depth).map_err(|fault| fault.raise(value.py(), root))?;
    Ok(out)
}

/// Why a value has no JSON text, and where, from the inside out.
struct Fault {
    message: String,
    path: Vec<Step>,
}

enum Step {
    Key(String),
    Index(usize),
}

impl Fault {
    #[cold]
    fn new(message: impl Into<String>) -> Box<Self> {
        Box::new(Self { message: message.into(), path: Vec::new() })
    }

    #[cold]
    fn inside(mut self: Box<Self>, step: Step) -> Box<Self> {
        self.path.push(step);
        self
    }

    fn raise(&self, py: Python<'_>, root: &str) -> PyErr {
        let mut path = root.to_owned();
        // A cycle would repeat its path up to the depth limit: the beginning says enough.
        for step in self.path.iter().rev().take(12) {
            let plain = |key: &str| !key.is_empty() && key.chars().all(|c| c.is_alphanumeric() || c == '_');
            match step {
                Step::Key(key) if plain(key) => path.extend([".", key]),
                Step::Key(key) => path.push_str(&format!("[{key:?}]")),
                Step::Index(index) => path.push_str(&format!("[{index}]")),
            }
        }
        if self.path.len() > 12 {
            path.push('…');
        }
        invalid_event(py, format!("{path} {}", self.message))
    }
}

type Written = Result<(), Box<Fault>>;

fn write(out: &mut Vec<u8>, value: &Bound<'_, PyAny>, room: usize) -> Written {
    // By exact type first: that is one comparison each.
    if let Ok(text) = value.cast_exact::<PyString>() {
        write_text(out, text)
    } else if value.is_exact_instance_of::<PyInt>() {
        write_int(out, value)
    } else if let Ok(dict) = value.cast_exact::<PyDict>() {
        write_dict(out, dict, room)
    } else if let Ok(list) = value.cast_exact::<PyList>() {
        write_list(out, list, room)
    } else if let Ok(float) = value.cast_exact::<PyFloat>() {
        write_float(out, float.value())
    } else if value.is_none() {
        out.extend_from_slice(b"null");
        Ok(())
    } else if let Ok(truth) = value.cast_exact::<PyBool>() {
        out.extend_from_slice(if truth.is_true() { b"true" } else { b"false" });
        Ok(())
    } else if let Ok(text) = value.cast::<PyString>() {
        write_text(out, text)
    } else if value.is_instance_of::<PyInt>() {
        write_int(out, value)
    } else if let Ok(dict) = value.cast::<PyDict>() {
        write_dict(out, dict, room)
    } else if let Ok(list) = value.cast::<PyList>() {
        write_list(out, list, room)
    } else if let Ok(tuple) = value.cast::<PyTuple>() {
        write_tuple(out, tuple, room)
    } else if let Ok(float) = value.cast::<PyFloat>() {
        write_float(out, float.value())
    } else {
        Err(Fault::new(advice(value)))
    }
}

fn write_text(out: &mut Vec<u8>, text: &Bound<'_, PyString>) -> Written {
    let text = text.to_str().map_err(|_| {
        Fault::new("holds a lone surrogate, which is no text; decode the bytes it came from with errors=\"replace\"")
    })?;
    write_str(out, text);
    Ok(())
}

fn write_str(out: &mut Vec<u8>, text: &str) {
    // Without an early exit, so that the compiler can look at many bytes at once.
    if !text.bytes().fold(false, |found, b| found | (b < 0x20) | (b == b'"') | (b == b'\\')) {
        out.reserve(text.len() + 2);
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
    } else {
        // Writing a str into a Vec cannot fail.
        let _ = serde_json::to_writer(out, text);
    }
}

fn write_int(out: &mut Vec<u8>, value: &Bound<'_, PyAny>) -> Written {
    if let Ok(small) = value.extract::<i64>() {
        let mut buffer = [0_u8; 20];
        let mut at = buffer.len();
        let mut rest = small.unsigned_abs();
        loop {
            at -= 1;
            buffer[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        if small < 0 {
            out.push(b'-');
        }
        out.extend_from_slice(&buffer[at..]);
        return Ok(());
    }
    // int's own repr, not str(value): an enum's would be its name.
    let digits = value.py().get_type::<PyInt>().call_method1("__repr__", (value,));
    let digits = digits.and_then(|digits| digits.extract::<String>());
    let digits = digits.map_err(|error| Fault::new(format!("is too large an int: {error}; send it as a str")))?;
    out.extend_from_slice(digits.as_bytes());
    Ok(())
}

fn write_float(out: &mut Vec<u8>, value: f64) -> Written {
    if !value.is_finite() {
        let name = if value.is_nan() { "NaN" } else { "infinite" };
        return Err(Fault::new(format!("is {name}, which JSON cannot say; use None, or a str")));
    }
    // Writing a finite number into a Vec cannot fail.
    let _ = serde_json::to_writer(out, &value);
    Ok(())
}

fn too_deep() -> Box<Fault> {
    Fault::new("is nested too deep (64 levels at most), or contains itself; flatten it")
}

fn write_dict(out: &mut Vec<u8>, dict: &Bound<'_, PyDict>, room: usize) -> Written {
    let room = room.checked_sub(1).ok_or_else(too_deep)?;
    let mut separator = b'{';
    for (key, value) in dict.iter() {
        out.push(std::mem::replace(&mut separator, b','));
        let Ok(name) = key.cast::<PyString>() else {
            let kind = type_name(&key);
            return Err(Fault::new(format!("has a key of type {kind}; JSON keys are strings: use str(key)")));
        };
        write_text(out, name).map_err(|fault| fault.inside(Step::Key("key".into())))?;
        out.push(b':');
        write(out, &value, room).map_err(|fault| fault.inside(Step::Key(name.to_string_lossy().into_owned())))?;
    }
    if separator == b'{' {
        out.push(b'{');
    }
    out.push(b'}');
    Ok(())
}

fn write_list(out: &mut Vec<u8>, list: &Bound<'_, PyList>, room: usize) -> Written {
    let room = room.checked_sub(1).ok_or_else(too_deep)?;
    out.push(b'[');
    for (index, item) in list.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write(out, &item, room).map_err(|fault| fault.inside(Step::Index(index)))?;
    }
    out.push(b']');
    Ok(())
}

fn write_tuple(out: &mut Vec<u8>, tuple: &Bound<'_, PyTuple>, room: usize) -> Written {
    let room = room.checked_sub(1).ok_or_else(too_deep)?;
    out.push(b'[');
    for (index, item) in tuple.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write(out, &item, room).map_err(|fault| fault.inside(Step::Index(index)))?;
    }
    out.push(b']');
    Ok(())
}

pub fn type_name(value: &Bound<'_, PyAny>) -> String {
    value.get_type().qualname().map_or_else(|_| "?".into(), |name| name.to_string())
}

/// What a value of this type should be turned into.
#[cold]
fn advice(value: &Bound<'_, PyAny>) -> String {
    let has = |name: &str| value.get_type().hasattr(name).unwrap_or(false);
    let kind = type_name(value);
    let hint = match kind.as_str() {
        "Decimal" => "use str(value), which keeps its digits",
        "bytes" | "bytearray" | "memoryview" => "use base64.b64encode(value).decode(), or value.decode() for text",
        "set" | "frozenset" | "generator" | "dict_keys" | "dict_values" | "range" | "deque" => "use list(value)",
        "timedelta" => "use value.total_seconds()",
        "complex" => "use [value.real, value.imag]",
        _ if has("isoformat") => "use value.isoformat()",
        _ if has("model_dump") => "use value.model_dump(mode=\"json\")",
        _ if has("__dataclass_fields__") => "use dataclasses.asdict(value)",
        _ if has("__members__") => "use value.value",
        _ if has("tolist") => "use value.tolist()",
        _ if kind == "UUID" || has("__fspath__") => "use str(value)",
        _ if has("keys") => "use dict(value)",
        _ => "convert it to dict, list, str, int, float, bool or None",
    };
    format!("is a {kind}, which is not JSON; {hint}")
}

/// The Python objects of a JSON text that the codec accepted.
pub fn decode<'py>(py: Python<'py>, json: &[u8]) -> PyResult<Bound<'py, PyAny>> {
    static KEYS: Mutex<Keys> = Mutex::new(Keys(Vec::new()));
    // Another thread, or a finalizer that ran inside this very decode, may have it: then without.
    let mut keys = KEYS.try_lock().ok();
    let mut decoder = Decoder { py, jiter: Jiter::new(json), keys: keys.as_deref_mut() };
    let value = decoder.peek().and_then(|peek| decoder.value(peek, 200))?;
    decoder.jiter.finish().map_err(|error| not_json(py, &error))?;
    Ok(value)
}

fn not_json(py: Python<'_>, error: &JiterError) -> PyErr {
    if let JiterErrorType::JsonError(JsonErrorType::NumberOutOfRange) = error.error_type {
        return too_many_digits(py);
    }
    invalid_event(py, format!("the payload is not JSON text: {}", error.error_type))
}

struct Decoder<'py, 'j, 'k> {
    py: Python<'py>,
    jiter: Jiter<'j>,
    keys: Option<&'k mut Keys>,
}

impl<'py> Decoder<'py, '_, '_> {
    fn peek(&mut self) -> PyResult<Peek> {
        self.jiter.peek().map_err(|error| not_json(self.py, &error))
    }

    fn value(&mut self, peek: Peek, room: usize) -> PyResult<Bound<'py, PyAny>> {
        let py = self.py;
        let room = room.checked_sub(1).ok_or_else(|| PyRecursionError::new_err("the payload is nested too deep"))?;
        let fail = |error: JiterError| not_json(py, &error);
        match peek {
            Peek::Null => self.jiter.known_null().map_err(fail).map(|()| py.None().into_bound(py)),
            Peek::True | Peek::False => {
                let truth = self.jiter.known_bool(peek).map_err(fail)?;
                Ok(PyBool::new(py, truth).to_owned().into_any())
            }
            Peek::String => Ok(PyString::new(py, self.jiter.known_str().map_err(fail)?).into_any()),
            Peek::Array => {
                let mut items = Vec::new();
                let mut next = self.jiter.known_array().map_err(fail)?;
                while let Some(peek) = next {
                    items.push(self.value(peek, room)?);
                    next = self.jiter.array_step().map_err(fail)?;
                }
                Ok(PyList::new(py, items)?.into_any())
            }
            Peek::Object => {
                let dict = PyDict::new(py);
                let mut next = self.jiter.known_object().map_err(fail)?;
                while let Some(name) = next {
                    let key = match &mut self.keys {
                        Some(keys) => keys.get(py, name),
                        None => PyString::new(py, name),
                    };
                    let peek = self.peek()?;
                    dict.set_item(key, self.value(peek, room)?)?;
                    next = self.jiter.next_key().map_err(fail)?;
                }
                Ok(dict.into_any())
            }
            _ => number(py, self.jiter.known_number_bytes(peek).map_err(fail)?),
        }
    }
}

fn number<'py>(py: Python<'py>, digits: &[u8]) -> PyResult<Bound<'py, PyAny>> {
    // The parser lets only ASCII through.
    let digits = std::str::from_utf8(digits).unwrap_or("");
    if digits.bytes().any(|b| matches!(b, b'.' | b'e' | b'E')) {
        let value: f64 = digits.parse().map_err(|_| invalid_event(py, format!("{digits} is not a number")))?;
        return Ok(PyFloat::new(py, value).into_any());
    }
    match digits.parse::<i64>() {
        Ok(value) => Ok(PyInt::new(py, value).into_any()),
        Err(_) => int_type(py).call1((digits,)).map_err(|cause| {
            let error = too_many_digits(py);
            error.set_cause(py, Some(cause));
            error
        }),
    }
}

fn too_many_digits(py: Python<'_>) -> PyErr {
    invalid_event(py, "the payload holds a number with more digits than Python reads; take them from event.raw")
}

fn int_type(py: Python<'_>) -> &Bound<'_, PyType> {
    static INT: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    INT.get_or_init(py, || py.get_type::<PyInt>().unbind()).bind(py)
}

/// Python strings of recent keys: the same few names come with every event.
struct Keys(Vec<Option<(Box<str>, Py<PyString>)>>);

impl Keys {
    const SLOTS: usize = 1024;
    const LONGEST: usize = 40;

    fn get<'py>(&mut self, py: Python<'py>, name: &str) -> Bound<'py, PyString> {
        if name.len() > Self::LONGEST {
            return PyString::new(py, name);
        }
        if self.0.is_empty() {
            self.0.resize_with(Self::SLOTS, || None);
        }
        static HASH: ahash::RandomState = ahash::RandomState::with_seeds(1, 2, 3, 4);
        let mut hasher = HASH.build_hasher();
        hasher.write(name.as_bytes());
        let slot = &mut self.0[hasher.finish() as usize % Self::SLOTS];
        match slot {
            Some((known, key)) if **known == *name => key.bind(py).clone(),
            _ => {
                let key = PyString::new(py, name);
                *slot = Some((name.into(), key.clone().unbind()));
                key
            }
        }
    }
}
