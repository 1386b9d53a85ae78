"""Runs made by `convert reshape`: load each, write it again unchanged from these ranks (to `resaved/`), then train on."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch.distributed as dist

from rim_dist.checkpoint import store
from rim_dist.checkpoint.snapshot import write_files
from rim_dist.checkpoint.start import model_of
from rim_dist.model.skeleton import DTYPES
from rim_dist.parallel.degrees import fit_degrees
from rim_dist.parallel.launch import Process, join, leave
from rim_dist.parallel.mesh import make_mesh
from rim_dist.parallel.zero import compose, partitioner
from rim_dist.recipe import dump_recipe, load_recipe
from rim_dist.training.engine import Engine
from rim_dist.training.trainer import Trainer, prepare_run
from rim_dist.unwrap import bare_model


def resave(run: Path, process: Process) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    requirements, _ = prepare_run(recipe)
    source = store.find_checkpoint(run)
    mesh = make_mesh(fit_degrees(recipe, process.ranks), process.rank, "cpu")
    ds_config = compose(recipe, requirements.hidden_size)
    model = model_of(recipe, requirements, source, mesh, partitioner(ds_config, mesh, DTYPES[recipe.model.dtype]))
    engine = Engine(recipe, model, ds_config, process, mesh, requirements.sequence_mode)
    engine.load(source)
    state = replace(store.read_state(source), ranks=process.ranks)
    partial = store.partial_folder(run / "resaved", state.step)
    if process.is_first:
        store.start_writing(run / "resaved", state.step)
    dist.barrier()
    records = write_files(partial, engine.capture(partial))
    store.write_report(partial, process.rank, store.RankReport(records))
    dist.barrier()
    if process.is_first:
        bare_model(engine.module).config.save_pretrained(partial / store.MODEL)
        requirements.tokenizer.save_pretrained(partial / store.MODEL)
        reports = [store.read_report(partial, rank) for rank in range(process.ranks)]
        records = {name: record for report in reports if report for name, record in report.records.items()}
        store.announce(partial, state, dump_recipe(recipe), records)
    dist.barrier()


if __name__ == "__main__":
    process = join(120)
    for path in (Path(a) for a in sys.argv[1:] if not a.startswith("--")):
        resave(path, process)
        recipe = load_recipe(path / "recipe.yaml")
        requirements, data = prepare_run(recipe)
        Trainer(recipe, process, requirements, data).run()
    leave()
