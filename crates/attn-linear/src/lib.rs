//! Linear and recurrent attention on few engines.
