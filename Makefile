# make demo: set up, then the whole pipeline on the embedded data set, a score and a picture
# make test: set up, then the tests
# make voc DATA=data/VOC2012: the pipeline on VOC 2012
# make demo SEED=1 RUN=runs/toy1: another seed
PYTHON ?= python3
SEED ?= 0
DATA ?= data/VOC2012
CLS_FLAGS ?=
SEG_FLAGS ?=
TOY = data/toy
RUN = runs/toy
PY = .venv/bin/python

.PHONY: demo test voc clean

demo: .venv/ready $(TOY)/image_labels.txt
	$(PY) train_cls.py   --data $(TOY) --run $(RUN) --seed $(SEED) --resume
	$(PY) make_pseudo.py --data $(TOY) --run $(RUN)
	$(PY) train_seg.py   --data $(TOY) --run $(RUN) --seed $(SEED) --resume
	$(PY) evaluate.py    --data $(TOY) --run $(RUN)

voc: .venv/ready
	$(PY) train_cls.py   --data $(DATA) --run runs/voc --resume $(CLS_FLAGS)
	$(PY) make_pseudo.py --data $(DATA) --run runs/voc
	$(PY) train_seg.py   --data $(DATA) --run runs/voc --resume $(SEG_FLAGS)
	$(PY) evaluate.py    --data $(DATA) --run runs/voc --crf

test: .venv/ready
	.venv/bin/pip install --quiet pytest
	$(PY) -m pytest -q tests

$(TOY)/image_labels.txt: | .venv/ready
	$(PY) data.py toy --root $(TOY)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf .venv $(TOY) $(RUN)
