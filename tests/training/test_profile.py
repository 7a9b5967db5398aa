"""Where the time of a step goes, from the events of a trace."""

import pytest

from training.metrics.profile import kind, of_events


def event(name, ts, dur):
    return {"name": name, "ts": ts, "dur": dur}


def test_kernels_that_overlap_count_once_as_busy_and_each_in_its_kind():
    events = [
        event("nvjet_tst_256x128", 0.0, 1000.0),
        event("ncclDevKernel_AllReduce", 500.0, 1000.0),
        event("forward_jvp_kernel", 2500.0, 500.0),
        event("nvjet_tst_256x128", 3000.0, 1000.0),
    ]
    found = of_events(events, steps=2)
    assert found.step_ms == pytest.approx(2.0)
    assert found.busy == pytest.approx(3000 / 4000)
    assert found.kinds["products"] == pytest.approx(1.0)
    assert found.kinds["communication"] == pytest.approx(0.5)
    assert found.kinds["attention"] == pytest.approx(0.25)
    assert found.exposed == pytest.approx(0.25)  # half of the exchange runs beside a product
    assert found.kernels[0] == ("nvjet_tst_256x128", 1.0, 1.0)
    assert of_events([], steps=2).step_ms == 0.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("keys_jvp_kernel", "attention"),
        ("row_sums_kernel", "attention"),
        ("_residual_norm_forward", "elementwise"),
        ("_residual_norm_backward", "elementwise"),
        ("triton_poi_fused__to_copy_cat_stack_7", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdam>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
    ],
)
def test_a_kernel_has_one_kind(name, expected):
    assert kind(name) == expected
