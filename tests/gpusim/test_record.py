"""The recording runtime sees each launcher of misuse.cu do wrong, and lets the one that does right pass."""

import ctypes

import pytest
from gpusim.build import HERE, build, why_not
from gpusim.record import STREAMS, LauncherError, Recorder

DEVICE, STREAM = 2, 2 * STREAMS + 7
ERROR = "goes on after an error: launch dropout_kernel"
SEEN = {
    "waits": "calls cudaStreamSynchronize",
    "allocates": "calls cudaMalloc",
    "forgets_the_stream": f"puts dropout on stream {STREAM - 7} of device {DEVICE}, not {STREAM} of {DEVICE}",
    "takes_another_device": f"puts dropout on stream {STREAM + STREAMS} of device {DEVICE + 1}, not",
    "leaves_the_device": f"leaves device {DEVICE} current, which was 0",
    "launches_twice": "launches dropout dropout",
    "launches_no_blocks": f"{ERROR} {DEVICE} {STREAM} 3,0,1 32,1,1 0 9",
    "launches_too_many_blocks": f"{ERROR} {DEVICE} {STREAM} 1,65536,1 32,1,1 0 9",
    "launches_large_blocks": f"{ERROR} {DEVICE} {STREAM} 2,1,1 1056,1,1 0 9",
    "takes_shared_memory_unasked": f"{ERROR} {DEVICE} {STREAM} 2,1,1 32,1,1 61441 1",
    "takes_the_default_stream": f"{ERROR} {DEVICE} 0 2,1,1 32,1,1 0 400",
}


@pytest.fixture(scope="module")
def library():
    if reason := why_not():
        pytest.skip(reason)
    return build([HERE / "misuse.cu"])


@pytest.fixture
def launch(library):
    """launch(name): that launcher, watched."""
    recorder, functions = Recorder(library), ctypes.CDLL(str(library))

    def call(name):
        with recorder.watching("dropout", DEVICE, STREAM):
            functions[name](DEVICE, ctypes.c_void_p(STREAM))

    call.recorder = recorder
    yield call
    recorder.capture(None)
    functions.make_current(0)


@pytest.mark.parametrize("name", SEEN)
def test_a_launcher_that_does_wrong_is_seen(launch, name):
    launch("does_right")
    with pytest.raises(LauncherError) as raised:
        launch(name)
    assert SEEN[name] in str(raised.value)


def test_setting_up_in_a_capture_is_seen(launch):
    launch.recorder.capture(STREAM)
    with pytest.raises(LauncherError, match="asks for attribute while it is captured"):
        launch("sets_up")
    launch.recorder.capture(STREAM + 1)
    launch("sets_up")
