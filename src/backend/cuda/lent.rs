//! A context and a stream that the host lends: what has to be known of them before they are used.

use super::driver::{Context, DeviceHandle, Driver, Fault, NO_HANDLE, StreamHandle};
use crate::backend::device::LentContext;
use crate::error::{Error, Result, Status};

/// As the driver has it.
pub fn context_of(lent: &LentContext) -> Context {
    lent.context().cast()
}

/// As the driver has it.
pub fn stream_of(lent: &LentContext) -> Option<StreamHandle> {
    lent.stream().map(|stream| stream.cast())
}

/// The device of a lent context. Fails with `InvalidArgument` where the driver does not know the context, or where the stream is
/// not one of its.
pub fn device_of(driver: &Driver, lent: &LentContext) -> Result<DeviceHandle> {
    let context = context_of(lent);
    let error = |key: &str, text: &str, fault: Fault| match NO_HANDLE.contains(&fault.code) {
        true => {
            let (name, code) = (driver.name_of(fault.code), fault.code);
            let text = format!("{key} is {text}: {} answers {name} ({code})", fault.call);
            Error::new(Status::InvalidArgument, text).at_key(key)
        }
        false => driver.start_error(fault),
    };
    let device =
        driver.device_of(context).map_err(|fault| error("cuda_context", "no context of the driver's", fault))?;
    if let Some(stream) = stream_of(lent) {
        let of = driver.context_of(context, stream);
        let of = of.map_err(|fault| error("cuda_stream", "no stream of the driver's", fault))?;
        if of != context {
            let text = "cuda_stream is a stream of another context than cuda_context";
            return Err(Error::new(Status::InvalidArgument, text).at_key("cuda_stream"));
        }
    }
    Ok(device)
}
