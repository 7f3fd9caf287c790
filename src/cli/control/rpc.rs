//! JSON-RPC 2.0: from a line to calls, and from their results to a line.
//!
//! A line comes from whoever may open the socket. It is bounded before it gets here, and the parser
//! bounds how deep it is nested.

use serde_json::{Map, Value, json};

/// Most calls in one batch.
pub(crate) const MAX_BATCH: usize = 64;

/// Named arguments of a call.
pub(crate) type Parameters = Map<String, Value>;

/// The line is no JSON.
const PARSE_ERROR: i64 = -32700;
/// It is JSON, but no call.
const INVALID_REQUEST: i64 = -32600;
/// There is no such method.
const METHOD_NOT_FOUND: i64 = -32601;
/// The method does not take such arguments.
const INVALID_PARAMS: i64 = -32602;
/// The method was refused, or has failed; the first of the codes that are left to servers.
const FAILED: i64 = -32000;

/// Why a call has no result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    code: i64,
    message: String,
}

impl Failure {
    fn new(code: i64, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    fn invalid_request(message: impl Into<String>) -> Self {
        Self::new(INVALID_REQUEST, message)
    }

    /// There is no such method; `known` are those that there are.
    pub(crate) fn unknown_method(name: &str, known: &str) -> Self {
        let name: String = name.chars().take(64).collect();
        Self::new(METHOD_NOT_FOUND, format!("there is no method {name:?}; there are {known}"))
    }

    /// The arguments are wrong; `message` says what would be right.
    pub(crate) fn parameters(message: impl Into<String>) -> Self {
        Self::new(INVALID_PARAMS, message)
    }

    /// What was asked for was refused or has failed; `message` says what to do.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(FAILED, message)
    }

    fn answer(&self, id: Value) -> Value {
        let error = json!({ "code": self.code, "message": self.message });
        json!({ "jsonrpc": "2.0", "id": id, "error": error })
    }
}

/// The answer to a line that is longer than any that is read.
pub(crate) fn too_long(limit: usize) -> Vec<u8> {
    let why = format!("a call has at most {limit} bytes, with the line's end");
    line(&Failure::invalid_request(why).answer(Value::Null))
}

/// Serves one line; gives the line to answer, if there is something to answer. `run` carries a
/// method out.
pub(crate) fn serve(
    bytes: &[u8],
    run: &mut dyn FnMut(&str, &Parameters) -> Result<Value, Failure>,
) -> Option<Vec<u8>> {
    let answer = match serde_json::from_slice::<Value>(bytes) {
        Err(error) => {
            let why = format!("this is no JSON text in UTF-8: {error}");
            Some(Failure::new(PARSE_ERROR, why).answer(Value::Null))
        }
        Ok(Value::Array(calls)) if calls.is_empty() || calls.len() > MAX_BATCH => {
            let why = format!("a batch has 1 to {MAX_BATCH} calls");
            Some(Failure::invalid_request(why).answer(Value::Null))
        }
        Ok(Value::Array(calls)) => {
            let answers: Vec<Value> = calls.iter().filter_map(|call| one(call, run)).collect();
            (!answers.is_empty()).then_some(Value::Array(answers))
        }
        Ok(call) => one(&call, run),
    };
    answer.as_ref().map(line)
}

fn line(answer: &Value) -> Vec<u8> {
    let mut bytes = answer.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

/// Serves one call; a call without an id wants no answer, whatever becomes of it.
fn one(
    call: &Value,
    run: &mut dyn FnMut(&str, &Parameters) -> Result<Value, Failure>,
) -> Option<Value> {
    let (id, method, parameters) = match take_apart(call) {
        Ok(parts) => parts,
        Err((id, failure)) => return Some(failure.answer(id)),
    };
    let result = match parameters {
        Ok(parameters) => run(method, parameters.unwrap_or(&Parameters::new())),
        Err(failure) => Err(failure),
    };
    let id = id?.clone();
    Some(match result {
        Ok(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
        Err(failure) => failure.answer(id),
    })
}

/// An id if there is one, a method's name, and its arguments, which may be refused.
type Parts<'a> = (Option<&'a Value>, &'a str, Result<Option<&'a Parameters>, Failure>);

fn take_apart(call: &Value) -> Result<Parts<'_>, (Value, Failure)> {
    let refuse = |id: Option<&Value>, why: &str| {
        Err((id.cloned().unwrap_or(Value::Null), Failure::invalid_request(why)))
    };
    let Value::Object(fields) = call else {
        return refuse(None, "a call is an object with jsonrpc, id, method and params");
    };
    let id = fields.get("id");
    if !matches!(id, None | Some(Value::Null | Value::Number(_) | Value::String(_))) {
        return refuse(None, "an id is a number or a string");
    }
    if fields.get("jsonrpc").and_then(Value::as_str) != Some("2.0") {
        return refuse(id, "the call must say \"jsonrpc\":\"2.0\"");
    }
    let Some(method) = fields.get("method").and_then(Value::as_str) else {
        return refuse(id, "the call must name a method");
    };
    let parameters = match fields.get("params") {
        None => Ok(None),
        Some(Value::Object(parameters)) => Ok(Some(parameters)),
        Some(Value::Array(list)) if list.is_empty() => Ok(None),
        Some(Value::Array(_)) => {
            Err(Failure::parameters("arguments are given by name, as an object"))
        }
        Some(_) => return refuse(id, "params is an object"),
    };
    Ok((id, method, parameters))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a line is answered with, and which methods were carried out.
    fn ask(bytes: &[u8]) -> (Option<Value>, Vec<String>) {
        let mut done = Vec::new();
        let answer = serve(bytes, &mut |method, parameters| {
            done.push(format!("{method}{}", Value::Object(parameters.clone())));
            match method {
                "good" => Ok(json!(7)),
                "bad" => Err(Failure::failed("no")),
                _ => Err(Failure::unknown_method(method, "good and bad")),
            }
        });
        let answer = answer.map(|line| {
            assert_eq!(line.last(), Some(&b'\n'));
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            serde_json::from_slice(&line).expect("JSON")
        });
        (answer, done)
    }

    fn code(bytes: &[u8]) -> i64 {
        let (answer, _) = ask(bytes);
        let answer = answer.expect("an answer");
        let message = answer["error"]["message"].as_str().expect("a message");
        assert!(!message.is_empty() && message.len() < 300, "{message}");
        answer["error"]["code"].as_i64().expect("a code")
    }

    #[test]
    fn a_call_is_answered_with_its_id() {
        for id in ["1", "\"x\"", "null", "1.5", "18446744073709551615"] {
            let text =
                format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"good","params":{{"a":1}}}}"#);
            let (answer, done) = ask(text.as_bytes());
            let answer = answer.expect("an answer");
            assert_eq!(answer["id"].to_string(), id);
            assert_eq!((&answer["result"], &answer["jsonrpc"]), (&json!(7), &json!("2.0")));
            assert_eq!(done, [r#"good{"a":1}"#]);
        }
    }

    #[test]
    fn a_notification_is_carried_out_and_not_answered() {
        for (method, ran) in [("good", true), ("bad", true), ("unknown", true)] {
            let text = format!(r#"{{"jsonrpc":"2.0","method":"{method}"}}"#);
            let (answer, done) = ask(text.as_bytes());
            assert_eq!((answer, done.len() == 1), (None, ran), "{method}");
        }
        let (answer, done) = ask(br#"{"jsonrpc":"2.0","method":"good","params":[1]}"#);
        assert_eq!((answer, done.len()), (None, 0), "wrong arguments are nobody's to hear of");
    }

    #[test]
    fn each_mistake_has_its_code() {
        for (text, expected) in [
            ("", PARSE_ERROR),
            ("{", PARSE_ERROR),
            ("{}x", PARSE_ERROR),
            ("nonsense", PARSE_ERROR),
            ("1e999", PARSE_ERROR),
            ("7", INVALID_REQUEST),
            ("[]", INVALID_REQUEST),
            ("{}", INVALID_REQUEST),
            (r#"{"id":1,"method":"good"}"#, INVALID_REQUEST),
            (r#"{"jsonrpc":"1.0","id":1,"method":"good"}"#, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":1}"#, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":1,"method":7}"#, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":[],"method":"good"}"#, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":true,"method":"good"}"#, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":1,"method":"good","params":"x"}"#, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":1,"method":"good","params":[1]}"#, INVALID_PARAMS),
            (r#"{"jsonrpc":"2.0","id":1,"method":"other"}"#, METHOD_NOT_FOUND),
            (r#"{"jsonrpc":"2.0","id":1,"method":"bad"}"#, FAILED),
        ] {
            assert_eq!(code(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn hostile_lines_are_answered_in_a_moment() {
        let deep = [vec![b'['; 60_000], vec![b']'; 60_000]].concat();
        assert_eq!(code(&deep), PARSE_ERROR);
        let objects = "{\"a\":".repeat(10_000);
        assert_eq!(code(objects.as_bytes()), PARSE_ERROR);
        assert_eq!(code(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\xff\xfe\"}"), PARSE_ERROR);
        assert_eq!(code(b"\xff"), PARSE_ERROR);
        assert_eq!(code(b"\"\\ud800\""), PARSE_ERROR, "half a character");
        assert_eq!(code(&[0; 1000]), PARSE_ERROR);
        let long = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{}"}}"#, "x".repeat(60_000));
        assert_eq!(code(long.as_bytes()), METHOD_NOT_FOUND);
        let digits = "9".repeat(60_000);
        assert_eq!(code(digits.as_bytes()), PARSE_ERROR);
        let many = format!("[{}1]", "1,".repeat(30_000));
        assert_eq!(code(many.as_bytes()), INVALID_REQUEST);
    }

    #[test]
    fn a_batch_has_an_answer_for_each_call_that_wants_one() {
        let (answer, done) =
            ask(br#"[{"jsonrpc":"2.0","id":1,"method":"good"},{"jsonrpc":"2.0","method":"good"},3,
                {"jsonrpc":"2.0","id":2,"method":"bad"}]"#);
        let answer = answer.expect("an answer");
        let answers = answer.as_array().expect("a list");
        assert_eq!((answers.len(), done.len()), (3, 3));
        assert_eq!(answers[0]["result"], json!(7));
        assert_eq!(answers[1]["error"]["code"], json!(INVALID_REQUEST));
        assert_eq!((&answers[2]["id"], &answers[2]["error"]["code"]), (&json!(2), &json!(FAILED)));
        assert_eq!(ask(br#"[{"jsonrpc":"2.0","method":"good"}]"#).0, None);
    }
}
