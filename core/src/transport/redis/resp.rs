//! Reads the server's answers out of what has arrived: the protocol in its versions 2 and 3.
//!
//! What is frequent is read here, the rest by the library. An answer may arrive in pieces; lists that are not complete are
//! kept, so that nothing is read twice but the beginning of one text.

use std::io;

use bytes::{Buf, BytesMut};
use redis::Value;

/// Deepest nesting of lists.
const DEPTH: usize = 100;
/// Room that is made for a list at first, whatever length it says it has.
const ROOM: usize = 1024;

/// See the module's page.
#[derive(Default)]
pub(super) struct Reader {
    open: Vec<List>,
}

/// A list of which something is missing.
struct List {
    kind: u8,
    left: usize,
    items: Vec<Value>,
}

/// What begins at the front.
enum Piece {
    Whole(Value),
    List { kind: u8, count: usize },
}

impl Reader {
    /// The next answer, if it has arrived completely; takes it off the front.
    pub fn next(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Value>> {
        let mut at = 0;
        let found = loop {
            let Some((piece, length)) = piece(&buffer[at..])? else { break None };
            at += length;
            let whole = match piece {
                Piece::Whole(value) => Some(value),
                Piece::List { kind, count: 0 } => Some(list(kind, Vec::new())?),
                Piece::List { kind, count } => {
                    if self.open.len() == DEPTH {
                        return Err(strange("lists in lists without end"));
                    }
                    self.open.push(List { kind, left: count, items: Vec::with_capacity(count.min(ROOM)) });
                    None
                }
            };
            if let Some(value) = whole.map(|value| self.put(value)).transpose()?.flatten() {
                break Some(value);
            }
        };
        buffer.advance(at);
        Ok(found)
    }

    /// Puts a value where it belongs; gives the answer that is complete with it.
    fn put(&mut self, mut value: Value) -> io::Result<Option<Value>> {
        while let Some(mut last) = self.open.pop() {
            last.items.push(value);
            last.left -= 1;
            if last.left > 0 {
                self.open.push(last);
                return Ok(None);
            }
            value = list(last.kind, last.items)?;
        }
        Ok(Some(value))
    }
}

/// The piece at the front and its length, if it is complete.
fn piece(buffer: &[u8]) -> io::Result<Option<(Piece, usize)>> {
    let Some(end) = buffer.iter().position(|byte| *byte == b'\n') else { return Ok(None) };
    let [kind, line @ .., b'\r'] = &buffer[..end] else { return Err(strange("a line without its end")) };
    let length = end + 1;
    let whole = |value| Ok(Some((Piece::Whole(value), length)));
    match kind {
        b'+' if line == b"OK" => whole(Value::Okay),
        // One for each command of a transaction: not worth a text of its own.
        b'+' if line == b"QUEUED" => whole(Value::Okay),
        b':' => whole(Value::Int(number(line)?)),
        b'_' => whole(Value::Nil),
        b'$' | b'=' | b'!' => {
            let Ok(size) = usize::try_from(number(line)?) else { return whole(Value::Nil) };
            let total =
                length.checked_add(size).and_then(|sum| sum.checked_add(2)).ok_or_else(|| strange("a length"))?;
            if buffer.len() < total {
                return Ok(None);
            }
            let value = match kind {
                b'$' => Value::BulkString(buffer[length..length + size].to_vec()),
                _ => rare(&buffer[..total])?,
            };
            Ok(Some((Piece::Whole(value), total)))
        }
        b'*' | b'~' | b'%' | b'>' => {
            let Ok(count) = usize::try_from(number(line)?) else { return whole(Value::Nil) };
            let count = if *kind == b'%' { count.checked_mul(2) } else { Some(count) };
            let count = count.ok_or_else(|| strange("a length"))?;
            Ok(Some((Piece::List { kind: *kind, count }, length)))
        }
        b'+' | b'-' | b',' | b'#' | b'(' => whole(rare(&buffer[..length])?),
        _ => Err(strange("an unknown kind of answer")),
    }
}

/// What the library reads.
fn rare(bytes: &[u8]) -> io::Result<Value> {
    redis::parse_redis_value(bytes).map_err(|cause| strange(&cause.to_string()))
}

fn list(kind: u8, items: Vec<Value>) -> io::Result<Value> {
    Ok(match kind {
        b'~' => Value::Set(items),
        b'%' => {
            let mut pairs = Vec::with_capacity(items.len() / 2);
            let mut items = items.into_iter();
            while let (Some(key), Some(value)) = (items.next(), items.next()) {
                pairs.push((key, value));
            }
            Value::Map(pairs)
        }
        // Nobody looks into it.
        b'>' => Value::Push { kind: redis::PushKind::Other(String::new()), data: items },
        _ => Value::Array(items),
    })
}

fn number(line: &[u8]) -> io::Result<i64> {
    let text = std::str::from_utf8(line).ok();
    text.and_then(|text| text.parse().ok()).ok_or_else(|| strange("no number"))
}

fn strange(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the answer cannot be read: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8], step: usize) -> Vec<Value> {
        let (mut reader, mut buffer, mut found) = (Reader::default(), BytesMut::new(), Vec::new());
        for part in bytes.chunks(step) {
            buffer.extend_from_slice(part);
            while let Some(value) = reader.next(&mut buffer).unwrap() {
                found.push(value);
            }
        }
        assert!(buffer.is_empty());
        found
    }

    #[test]
    fn reads_as_the_library_does_however_it_arrives() {
        let answers: &[&[u8]] = &[
            b"+OK\r\n",
            b"+PONG\r\n",
            b"-NOGROUP No such key\r\n",
            b":-12\r\n",
            b"$-1\r\n",
            b"$0\r\n\r\n",
            b"$4\r\na\r\nb\r\n",
            b"*-1\r\n",
            b"*0\r\n",
            b"*2\r\n*1\r\n:1\r\n*2\r\n$1\r\nx\r\n_\r\n",
            b"%1\r\n$1\r\ns\r\n*1\r\n*2\r\n$3\r\n1-1\r\n*2\r\n$1\r\nt\r\n$2\r\no.\r\n",
            b"~1\r\n#t\r\n",
            b",1.5\r\n",
            b"=7\r\ntxt:abc\r\n",
            b"!5\r\nERR x\r\n",
        ];
        let expected: Vec<_> = answers.iter().map(|one| redis::parse_redis_value(one).unwrap()).collect();
        for step in [1, 2, 7, 1000] {
            assert_eq!(all(&answers.concat(), step), expected);
        }
        assert_eq!(all(b"+QUEUED\r\n>2\r\n$1\r\na\r\n:1\r\n:2\r\n", 3).len(), 3);
    }

    #[test]
    fn refuses_what_is_no_answer() {
        for wrong in [&b"x\r\n"[..], b":x\r\n", b"+OK\n", &b"*1\r\n".repeat(DEPTH + 1)] {
            assert!(Reader::default().next(&mut BytesMut::from(wrong)).is_err());
        }
    }
}
