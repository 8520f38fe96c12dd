//! Trainable selection: choices against other people's code and against sorting, outputs, gradients, promises.

mod routed {
    mod choices;
    mod compressed;
    mod golden;
    mod magic_pig;
    mod nsa;
    mod pages;
    mod promises;
    mod streams;
    mod training;
}
