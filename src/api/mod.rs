//! HTTP on two UNIX sockets: one that changes things, one that only tells.
//!
//! `api.sock` (mode 0600)
//!
//! | request | does |
//! |---|---|
//! | `GET /v1/state` | desired state, as JSON |
//! | `PUT /v1/state?dry_run=true` | replaces desired state; body JSON, or TOML as `application/toml` |
//! | `GET /v1/{ports,networks,underlays}[/NAME]` | objects as they are: settings, session, rings, counters |
//! | `GET /v1/{groups,rules}[/NAME]` | settings, members, hits |
//! | `GET /v1/{fdb,workers}` | learned addresses; the workers' loops |
//! | `GET /v1/connections[/PORT]` | what rules have let begin, of all ports or of one; 65,536 at most, else header `dreamwire-cut-after` |
//! | `GET /v1/drops?since=N` | samples of dropped frames, from number N on, and the number of the next |
//! | `GET /v1/why?port=&protocol=&source=&destination=` | what would become of a flow; also `icmp`, `mac`, `identity` |
//! | `POST /v1/{ports,networks,underlays,groups,rules}` | adds the object in the body; 409 if there is one of that name |
//! | `PUT`, `PATCH`, `DELETE /v1/{..}/NAME` | replaces or adds; changes the keys given (`null` removes); removes |
//! | `PUT`, `DELETE /v1/networks/NAME/remotes/ADDRESS` | one remote of a network |
//! | `GET /v1/ports/NAME/qemu-args?format=libvirt` | what attaches a VM, as text |
//!
//! Every change is a whole document that is validated and applied or refused as one; `?dry_run=true` only tells the
//! differences. Errors are `{"errors": [{"path", "line", "message"}]}`: 400 no JSON or TOML, 404 no such object,
//! 409 taken (a name, a socket, an address), 413 too big, 415 neither JSON nor TOML, 422 mistakes in the document.
//!
//! `stats.sock` (mode 0666): `GET /metrics` (OpenMetrics), `GET /stats` (JSON).

mod ask;
mod desired;
mod listener;
mod metrics;
mod observed;
mod perimeter;
mod reply;

use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post, put};

use crate::config::TEXT_BYTES_MAX;
use crate::control::ControlHandle;
use ask::Rings;
pub use listener::serve;
use reply::Refusal;

/// Header of an answer that is cut: how much there is in it. There is more.
pub(crate) const CUT_HEADER: &str = "dreamwire-cut-after";

/// A request that takes longer is answered with 504; a change that it began goes on.
const REQUEST_SECONDS_MAX: u64 = 60;

/// What every request works with.
#[derive(Debug, Clone)]
struct Shared {
    control: ControlHandle,
    rings: Rings,
}

/// Both sockets' routers: the API's and the statistics'.
pub fn routers(control: ControlHandle) -> (Router, Router) {
    let shared = Shared { control, rings: Rings::default() };
    let api = Router::new()
        .route("/v1/state", get(desired::show).put(desired::replace))
        .route("/v1/why", get(perimeter::why))
        .route("/v1/drops", get(perimeter::drops))
        .route("/v1/{kind}", get(observed::list).merge(post(desired::add)))
        .route("/v1/{kind}/{name}", get(observed::one).put(desired::put).patch(desired::patch).delete(desired::remove))
        .route("/v1/networks/{name}/remotes/{address}", put(desired::add_remote).delete(desired::remove_remote))
        .route("/v1/ports/{name}/qemu-args", get(desired::qemu_args))
        .with_state(shared.clone());
    let stats =
        Router::new().route("/metrics", get(metrics::scrape)).route("/stats", get(observed::stats)).with_state(shared);
    (limited(api), limited(stats))
}

fn limited(router: Router) -> Router {
    router
        .fallback(|| async { Refusal::new(StatusCode::NOT_FOUND, "", "no such resource") })
        .method_not_allowed_fallback(|| async {
            Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "", "this resource does not have that method")
        })
        .layer(DefaultBodyLimit::max(TEXT_BYTES_MAX))
        .layer(middleware::from_fn(time_limit))
}

async fn time_limit(request: Request, next: Next) -> Result<Response, Refusal> {
    let limit = Duration::from_secs(REQUEST_SECONDS_MAX);
    tokio::time::timeout(limit, next.run(request)).await.map_err(|_| {
        let message = format!("no answer within {REQUEST_SECONDS_MAX} s; a change that was begun goes on");
        Refusal::new(StatusCode::GATEWAY_TIMEOUT, "", message)
    })
}
