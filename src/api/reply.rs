//! Refusals as HTTP: a status and a list of what is wrong where.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::config::Mistake;
use crate::control::{ApplyError, ControlGone};

/// A request that was not done.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    errors: Vec<Mistake>,
}

#[derive(Serialize)]
struct Body {
    errors: Vec<Mistake>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, path: &str, message: impl Into<String>) -> Self {
        Self { status, errors: vec![Mistake::new(path, message)] }
    }

    pub(super) fn not_found(kind: &str, name: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, &format!("{kind}.{name}"), format!("there is no {kind} {name:?}"))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(Body { errors: self.errors })).into_response()
    }
}

impl From<ApplyError> for Refusal {
    fn from(error: ApplyError) -> Self {
        match error {
            ApplyError::Mistakes(errors) => Self { status: StatusCode::UNPROCESSABLE_ENTITY, errors },
            ApplyError::Host(mistake) => Self { status: StatusCode::CONFLICT, errors: vec![mistake] },
        }
    }
}

impl From<ControlGone> for Refusal {
    fn from(gone: ControlGone) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "", gone.to_string())
    }
}
