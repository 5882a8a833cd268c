//! The service in the words of its protocol.

use std::collections::BTreeMap;
use std::time::Duration;

use tonic::codegen::tokio_stream::{self, Stream};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::activations::{Activate, Activations};
use super::filter::Filter;
use super::protocol::mounts::mounts_server::Mounts;
use super::protocol::mounts::{
    ActivateRequest, ActivateResponse, DeactivateRequest, InfoRequest, InfoResponse, ListMessage,
    ListRequest, UpdateRequest, UpdateResponse,
};
use super::protocol::types;
use super::record::{ActiveMount, Info};
use crate::Mount;

/// The key of the metadata with the namespace. (containerd, `pkg/namespaces/grpc.go`)
const NAMESPACE: &str = "containerd-namespace";

/// The key of the metadata with the time that the client waits. (gRPC over HTTP/2, `Timeout`)
const TIMEOUT: &str = "grpc-timeout";

/// The calls of the service.
#[derive(Debug)]
pub(super) struct Calls(pub(super) Activations);

#[tonic::async_trait]
impl Mounts for Calls {
    async fn activate(
        &self,
        request: Request<ActivateRequest>,
    ) -> Result<Response<ActivateResponse>, Status> {
        let namespace = namespace(request.metadata())?;
        let timeout = timeout(request.metadata())?;
        let request = request.into_inner();
        let activate = Activate {
            namespace,
            name: request.name,
            mounts: request.mounts.into_iter().map(Mount::from).collect(),
            labels: request.labels.into_iter().collect(),
            temporary: request.temporary,
        };
        let activating = self.0.activate(activate);
        let info = match timeout {
            None => activating.await?,
            // Whether or not the client says that it has gone: what is activated too late is taken back.
            Some(timeout) => match tokio::time::timeout(timeout, activating).await {
                Ok(activated) => activated?,
                Err(_) => {
                    let message =
                        "the client's time is over; what was activated by then is taken back";
                    return Err(Status::deadline_exceeded(message));
                }
            },
        };
        let info = Some(info.into());
        Ok(Response::new(ActivateResponse { info }))
    }

    async fn deactivate(
        &self,
        request: Request<DeactivateRequest>,
    ) -> Result<Response<()>, Status> {
        let namespace = namespace(request.metadata())?;
        let name = request.into_inner().name;
        self.0.deactivate(&namespace, &name).await?;
        Ok(Response::new(()))
    }

    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let namespace = namespace(request.metadata())?;
        let info = self.0.info(&namespace, &request.into_inner().name)?;
        let info = Some(info.into());
        Ok(Response::new(InfoResponse { info }))
    }

    async fn update(
        &self,
        request: Request<UpdateRequest>,
    ) -> Result<Response<UpdateResponse>, Status> {
        let namespace = namespace(request.metadata())?;
        let UpdateRequest { info, update_mask } = request.into_inner();
        let info = info.ok_or_else(|| Status::invalid_argument("the update has no info"))?;
        let labels: BTreeMap<String, String> = info.labels.into_iter().collect();
        let fields = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let updated = self
            .0
            .update(&namespace, &info.name, labels, fields)
            .await?;
        let info = Some(updated.into());
        Ok(Response::new(UpdateResponse { info }))
    }

    type ListStream = Box<dyn Stream<Item = Result<ListMessage, Status>> + Send + Unpin>;

    async fn list(
        &self,
        request: Request<ListRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let namespace = namespace(request.metadata())?;
        let filter = Filter::parse(request.into_inner().filters);
        let filter = filter.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let infos = self.0.list(&namespace, &filter)?.into_iter();
        let messages = infos.map(|info| {
            let info = Some(info.into());
            Ok(ListMessage { info })
        });
        Ok(Response::new(Box::new(tokio_stream::iter(messages))))
    }
}

fn namespace(metadata: &MetadataMap) -> Result<String, Status> {
    let missing = || Status::failed_precondition(format!("the metadata has no {NAMESPACE}"));
    let value = metadata.get(NAMESPACE).ok_or_else(missing)?;
    let text = value.to_str();
    let no_text = |_| Status::invalid_argument(format!("{NAMESPACE} is no text"));
    text.map(str::to_owned).map_err(no_text)
}

/// How long the client waits, if it says so: up to eight digits and a unit.
fn timeout(metadata: &MetadataMap) -> Result<Option<Duration>, Status> {
    let Some(value) = metadata.get(TIMEOUT) else {
        return Ok(None);
    };
    let parsed = value.to_str().ok().and_then(|text| {
        let digits = text.trim_end_matches(|character: char| !character.is_ascii_digit());
        let number = digits.parse().ok().filter(|_| digits.len() <= 8);
        let number: u64 = number?;
        Some(match &text[digits.len()..] {
            "H" => Duration::from_secs(number * 3600),
            "M" => Duration::from_secs(number * 60),
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => return None,
        })
    });
    let wrong = || Status::invalid_argument(format!("{TIMEOUT} is no time, such as 100m"));
    parsed.map(Some).ok_or_else(wrong)
}

impl From<types::Mount> for Mount {
    fn from(mount: types::Mount) -> Self {
        Mount {
            kind: mount.r#type,
            source: mount.source,
            target: mount.target,
            options: mount.options,
        }
    }
}

impl From<Mount> for types::Mount {
    fn from(mount: Mount) -> Self {
        types::Mount {
            r#type: mount.kind,
            source: mount.source,
            target: mount.target,
            options: mount.options,
        }
    }
}

impl From<ActiveMount> for types::ActiveMount {
    fn from(active: ActiveMount) -> Self {
        let at = active.mounted_at;
        let seconds = i64::try_from(at.as_secs()).unwrap_or(i64::MAX);
        let nanos = at.subsec_nanos().cast_signed();
        types::ActiveMount {
            mount: Some(active.mount.into()),
            mounted_at: Some(prost_types::Timestamp { seconds, nanos }),
            mount_point: active.mount_point.display().to_string(),
            data: Default::default(),
        }
    }
}

impl From<Info> for types::ActivationInfo {
    fn from(info: Info) -> Self {
        types::ActivationInfo {
            name: info.name,
            active: info.active.into_iter().map(Into::into).collect(),
            system: info.system.into_iter().map(Into::into).collect(),
            labels: info.labels.into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use blockmount::Manager;
    use blockmount::testing::{FakeVm, Gate, MemoryJournal, VmStep};
    use tonic::Code;

    use super::super::activations::Options;
    use super::*;

    /// How long an event may take on a machine that is busy.
    const LONGEST: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn what_is_activated_after_the_time_of_the_client_is_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let vm = FakeVm::new();
        let builder = Manager::builder()
            .transport(vm.clone())
            .unplugger(vm.clone())
            .mounter(vm.clone());
        let recovery = builder.recover(MemoryJournal::new()).await.unwrap();
        let options = Options::new("/run/m", directory.path().join("records"));
        let calls = Calls(Activations::recover(recovery, options).await.unwrap());
        let request = |timeout: &'static str| {
            let layer = Mount::new("erofs", "/layer.erofs").option("ro").into();
            let mut request = Request::new(ActivateRequest {
                name: "one".to_owned(),
                mounts: vec![layer],
                ..ActivateRequest::default()
            });
            let metadata = request.metadata_mut();
            metadata.insert(NAMESPACE, "default".parse().unwrap());
            metadata.insert(TIMEOUT, timeout.parse().unwrap());
            request
        };
        vm.gate_next(VmStep::Attach, 1, Gate::Never);
        let late = tokio::time::timeout(LONGEST, calls.activate(request("10m"))).await;
        let late = late.expect("its deadline is over").unwrap_err();
        assert_eq!(late.code(), Code::DeadlineExceeded, "{late:?}");
        vm.until_called(VmStep::Attach, 1).await;
        vm.open_gates();
        // Behind it in the order of the name, which is free then.
        calls.activate(request("60S")).await.unwrap();
        assert_eq!(vm.calls(VmStep::Detach), 1);
        calls.0.deactivate("default", "one").await.unwrap();
        vm.assert_empty();
    }

    #[test]
    fn times_have_up_to_eight_digits_and_a_unit() {
        let of = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert(TIMEOUT, text.parse().unwrap());
            timeout(&metadata)
        };
        assert_eq!(timeout(&MetadataMap::new()).unwrap(), None);
        for (text, nanos) in [
            ("1n", 1),
            ("20u", 20_000),
            ("100m", 100_000_000),
            ("0S", 0),
            ("2M", 120_000_000_000),
            ("99999999H", 359_999_996_400_000_000_000),
        ] {
            let found = of(text).unwrap().unwrap();
            assert_eq!(found.as_nanos(), nanos, "{text}");
        }
        for text in ["", "1", "m", "-1m", "1.5S", "123456789m", "1mm", "1s"] {
            assert_eq!(
                of(text).unwrap_err().code(),
                Code::InvalidArgument,
                "{text}"
            );
        }
    }
}
