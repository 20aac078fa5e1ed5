# make demo: set up, then the whole pipeline on the embedded data set, a score and a picture
# make test: set up, then the tests
# make voc DATA=data/VOC2012, make coco DATA=data/COCO2014: the pipeline on those
# make table4 table5 figures: the paper's ablations, on the embedded data set or on DATA= PRESET=
# make demo SEED=1 RUN=runs/toy1: another seed
PYTHON ?= python3
SEED ?= 0
SEEDS ?= 0 1 2 3 4
JOBS ?= 2
PRESET ?=
CLS_FLAGS ?=
SEG_FLAGS ?=
TOY = data/toy
DATA ?= $(TOY)
RUN = runs/toy
PY = .venv/bin/python
# what the tables and figures need: the embedded data set is made first, and trained longer
STUDIED = .venv/ready $(if $(filter $(TOY),$(DATA)),$(TOY)/image_labels.txt)
STUDY_FLAGS = $(if $(filter $(TOY),$(DATA)),--epochs 12) $(CLS_FLAGS)

.PHONY: demo test voc coco table4 table5 figures clean

demo: .venv/ready $(TOY)/image_labels.txt
	$(PY) train_cls.py   --data $(TOY) --run $(RUN) --seed $(SEED) --resume
	$(PY) make_pseudo.py --data $(TOY) --run $(RUN)
	$(PY) train_seg.py   --data $(TOY) --run $(RUN) --seed $(SEED) --resume
	$(PY) evaluate.py    --data $(TOY) --run $(RUN)

voc: DATA = data/VOC2012
coco: DATA = data/COCO2014
voc coco: .venv/ready
	$(PY) train_cls.py   --data $(DATA) --run runs/$@ --resume $(CLS_FLAGS)
	$(PY) make_pseudo.py --data $(DATA) --run runs/$@
	$(PY) train_seg.py   --data $(DATA) --run runs/$@ --resume $(SEG_FLAGS)
	$(PY) evaluate.py    --data $(DATA) --run runs/$@ --crf

table4 table5: $(STUDIED)
	$(PY) extras/ablate.py $@ --data $(DATA) $(if $(PRESET),--preset $(PRESET)) --jobs $(JOBS) \
		--seeds $(SEEDS) --cls-flags="$(STUDY_FLAGS)"

figures: table4
	$(PY) extras/figures.py --data $(DATA)

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
