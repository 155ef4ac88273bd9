"""Training by the clock: a given time is used up, however fast the device."""

import json
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

REPORTS = 10  # on the way, evenly over the time


def learning_rate(progress: float, peak: float) -> float:
    """Warm up over 2 %, then fall along half a cosine to zero."""
    return peak * min(progress / 0.02, 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))))


def optimise(
    loss_of_batch: Callable[[], Tensor],
    parameters: list[Tensor],
    seconds: float,
    lr: float,
    after_step: Callable[[int], None],
    report: Callable[[], dict],
) -> list[dict]:
    """AdamW for so many seconds; the reports of the way, each with its step and training loss."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    curve: list[dict] = []
    start, step, next_report = time.perf_counter(), 0, 0.0
    while (progress := (time.perf_counter() - start) / seconds) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, lr)
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        after_step(step)
        if progress >= next_report:
            curve.append({"step": step, "seconds": round(progress * seconds, 1), "loss": round(loss.item(), 5)})
            if not math.isfinite(loss.item()):
                raise SystemExit(f"the loss is {loss.item()} at step {step}: try a lower --lr")
            curve[-1] |= report()
            print(json.dumps(curve[-1]), flush=True)
            next_report = progress + 1 / REPORTS
        elif step % 20 == 0:
            loss.item()  # keep the clock honest: the schedule must not run ahead of the device
    curve.append({"step": step, "seconds": round(seconds, 1), **report()})
    print(json.dumps(curve[-1]), flush=True)
    return curve
