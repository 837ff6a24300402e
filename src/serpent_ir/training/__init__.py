"""What training by a recipe is made of. Each file has one part, and `run.train` puts them together.

schedule      what step number n is: its stage, samples and learning rate
losses        the distance of restored from clean
networks      the network of a recipe and the weights it starts from
step          forward, backward and Adam, captured in a CUDA graph on a GPU
recompute     blocks that keep their input alone
workers       the processes that train together
checkpoints   folders of hashed files, whole or not there
validation    PSNR, SSIM and pictures
log           rows, progress and pictures of a run
room          what is said where memory is short
stopping      signals and time limits
trainer       the loop
plan          what a run would take, measured without training
recipe        what a run is told, read from YAML and checked
lock          one run for a folder
run           from a recipe to its weights: what `serpent_ir.train` hands on
"""
