//! The service in the words of its protocol.

use std::collections::BTreeMap;

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
        let request = request.into_inner();
        let activate = Activate {
            namespace,
            name: request.name,
            mounts: request.mounts.into_iter().map(Mount::from).collect(),
            labels: request.labels.into_iter().collect(),
            temporary: request.temporary,
        };
        let info = Some(self.0.activate(activate).await?.into());
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
