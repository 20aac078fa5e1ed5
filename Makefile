# make demo: set up, then the whole pipeline on a generated data set, a score and a picture
# make test: set up, then the tests
# make cpews: the second method (docs/CPEWS.md) on the generated data set, with its scores
# make voc DATA=data/VOC2012, make coco DATA=data/COCO2014: the pipeline on those
# make voc-small: VOC 2012 without a GPU: small networks, small sizes, few steps
# make table4 table5 figures: the paper's ablations, on the generated data set or on DATA= PRESET=;
#   SEEDS="0 1" for fewer runs, JOBS=4 for more at a time, FULL=1 to train DeepLabv2 as well
# make cpews2 cpews3 cpews4 cpews5: the same for the second method
# make demo SEED=1 RUN=runs/toy1: another seed
# make starter DIR=../assignment: the exercises of docs/TEACHING.md; make check EQ=8: one's tests
#   (EQ=1 to 10, confusion, iou, deeplabv2)
# make gpu: is a GPU right, how fast is it; PART=crf measures one part
# FLAGS="--workers 8": flags for every stage; CLS_FLAGS, SEG_FLAGS: for train_cls.py, train_seg.py;
#   CPEWS_FLAGS: for the training of extras/cpews/train.py
PYTHON ?= python3
SEED ?= 0
SEEDS ?= 0 1 2 3 4
TOY = data/toy
DATA ?= $(TOY)
ON_TOY = $(filter $(TOY),$(DATA))
JOBS ?= $(if $(ON_TOY),2,1)
FULL ?=
PART ?=
PRESET ?=
FLAGS ?=
CLS_FLAGS ?=
SEG_FLAGS ?=
DIR ?= ../assignment
EQ ?=
CPEWS_FLAGS ?=
RUN = runs/toy
PY = .venv/bin/python
CHECKS = $(wildcard tests/test_eq*.py) tests/test_score.py tests/test_deeplabv2.py
# threads that wait leave their core to others at once
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test gpu voc coco voc-small cpews table4 table5 cpews2 cpews3 cpews4 cpews5 figures starter check clean
.NOTPARALLEL:  # the stages share a run folder, the tables share runs

demo: .venv/ready $(TOY)/image_labels.txt
	$(PY) train_cls.py   --data $(TOY) --run $(RUN) --seed $(SEED) --resume $(FLAGS) $(CLS_FLAGS)
	$(PY) make_pseudo.py --data $(TOY) --run $(RUN) $(FLAGS)
	$(PY) train_seg.py   --data $(TOY) --run $(RUN) --seed $(SEED) --resume $(FLAGS) $(SEG_FLAGS)
	$(PY) evaluate.py    --data $(TOY) --run $(RUN) $(FLAGS)

voc voc-small: DATA = data/VOC2012
voc-small: override FLAGS += --preset voc-small
coco: DATA = data/COCO2014
voc coco voc-small: .venv/ready
	$(PY) train_cls.py   --data $(DATA) --run runs/$@ --resume $(FLAGS) $(CLS_FLAGS)
	$(PY) make_pseudo.py --data $(DATA) --run runs/$@ $(FLAGS)
	$(PY) train_seg.py   --data $(DATA) --run runs/$@ --resume $(FLAGS) $(SEG_FLAGS)
	$(PY) evaluate.py    --data $(DATA) --run runs/$@ --crf $(FLAGS)

cpews: RUN = runs/cpews
cpews: .venv/ready $(TOY)/superclasses.txt
	$(PY) extras/cpews/train.py --data $(TOY) --run $(RUN) --seed $(SEED) --resume $(FLAGS) $(CPEWS_FLAGS)
	$(PY) extras/cpews/train.py --data $(TOY) --run $(RUN) --predict train $(FLAGS)
	$(PY) extras/cpews/train.py --data $(TOY) --run $(RUN) --predict test $(FLAGS)

table4 table5 cpews2 cpews3 cpews4 cpews5: .venv/ready $(if $(ON_TOY),$(TOY)/superclasses.txt)
	$(PY) extras/study.py $@ --data $(DATA) --seeds $(SEEDS) --jobs $(JOBS) \
		--flags="$(if $(PRESET),--preset $(PRESET)) $(FLAGS)" $(if $(FULL),--full) \
		--cls-flags="$(CLS_FLAGS)" --cpews-flags="$(CPEWS_FLAGS)" --seg-flags="$(SEG_FLAGS)"

figures: table4 .venv/tests
	$(PY) extras/figures.py --data $(DATA)

starter: .venv/ready
	$(PY) extras/starter.py $(DIR)

test: .venv/tests
	$(PY) -m pytest -q tests

check: .venv/tests
	$(PY) -m pytest -q $(CHECKS) \
		-m $(if $(filter 1 2 3 4 5 6 7 8 9 10,$(EQ)),eq)$(or $(EQ),$(error EQ is needed: make check EQ=8))

gpu: .venv/tests
	$(PY) extras/bench.py --gpu --out runs/gpu.md $(if $(PART),--only $(PART))

# a folder of beetles from before superclasses.txt is completed
$(TOY)/image_labels.txt $(TOY)/superclasses.txt: | .venv/ready
	$(PY) data.py toy --root $(TOY)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	.venv/bin/pip install --quiet pydensecrf2 > .venv/pydensecrf2.log 2>&1 || \
		echo "pydensecrf2 cannot be built here (.venv/pydensecrf2.log): support/crf.py computes the CRF"
	touch $@

.venv/tests: tests/requirements.txt datasets/requirements.txt extras/requirements.txt .venv/ready
	.venv/bin/pip install --quiet -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv $(TOY) $(RUN)
